"""The dashboard and the rules, written by `python -m deploy.monitoring`."""
