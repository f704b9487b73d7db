"""The tests run in two processes (see pytest.ini), each with one thread: two processes that compute
with two threads each on two cores take ten times as long."""
import os

os.environ["OMP_NUM_THREADS"] = "1"  # also for the commands that tests run; before torch starts
