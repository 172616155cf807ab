"""The checks of the kit, by what they look at. Each is a function of the backend under test."""
