"""Public data sets, from the hub or from local files, in the project's form."""
