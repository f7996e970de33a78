"""What a job will take, before it does: rows sampled, requests sketched, GPUs computed."""
