"""Reports, tables and pictures of a model or of a run."""
