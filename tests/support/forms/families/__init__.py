"""The forms, a module for each kind of instruction; each has them in `FORMS`."""
