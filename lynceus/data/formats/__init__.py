"""The formats, one per file: each detects its layout, reads it into a Dataset, and writes it where that makes sense."""
