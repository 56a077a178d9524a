"""From committed records to tables, figures and the README. Pure functions of files; no torch."""
