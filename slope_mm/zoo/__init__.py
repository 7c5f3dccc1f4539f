"""The stock zoo: which configs of mmdet compress, train, predict, bake and pack, and how far."""
