"""The declarations of this wheel, a module for each family. None imports torch."""
