"""Runs and judges: machines are run here, and what came of it is compared with what had to come."""
