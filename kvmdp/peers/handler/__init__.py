"""A handler process that fills RAM: its server, and the source that asks it."""
