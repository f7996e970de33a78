"""A Ray cluster of two nodes, of 2 and 3 CPUs, on this machine until stdin is closed.

Prints its address, and the process id of the second node's raylet.
"""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster

if __name__ == "__main__":
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    second = cluster.add_node(num_cpus=3)
    [raylet] = second.all_processes["raylet"]
    print(cluster.address, raylet.process.pid, flush=True)
    sys.stdin.read()
    cluster.shutdown()
