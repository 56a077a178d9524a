"""``python -m maskllm4v``, which is the command ``maskllm4v``."""

from maskllm4v.cli.main import main

if __name__ == "__main__":
    main()
