"""What is seen of the service from outside: metrics, traces, logs."""
