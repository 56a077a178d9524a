"""Measured costs against what a user would do otherwise. Imports the library; the library never imports it."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler counts memory here; what it logs is noise
