"""A pattern and bits for every layer of its own, within a budget of bytes or bit operations."""
