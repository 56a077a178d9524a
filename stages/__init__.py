"""The pipeline's stages: each parses a row key, calls the library, writes its outputs."""
