"""The rooms of tools/setup_env.py. They know the standard library alone."""
