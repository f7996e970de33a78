"""What a cluster, a machine without GPU and the demo need."""
