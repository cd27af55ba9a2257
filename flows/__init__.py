"""The same steps under Prefect: decorators, artifacts and schedules; all logic is in cnnpipe."""
