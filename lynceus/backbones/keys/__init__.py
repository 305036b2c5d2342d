"""One small table per family: how its authors', timm's and torchvision's parameter names become ours.

A family's file holds `SOURCES: dict[str, tuple[Rule, ...]]` with the keys "authors", "timm", "torchvision" that exist.
They stand on this floor so that `create_model(name, weights=FILE)` needs nothing from above.
"""
