"""What `ops/up` does once everything is installed. Uses the command line and the REST API alone, as anybody could."""
