"""What is told of a job: tables on the terminal, the report and its page."""
