"""The tests run in two processes (see pytest.ini), each with one thread: two processes that compute
with two threads each on two cores take ten times as long."""
import os
import signal

os.environ["OMP_NUM_THREADS"] = "1"  # also for the commands that tests run; before torch starts
# a shell starts jobs in the background with Ctrl-C ignored, which the commands would inherit
signal.signal(signal.SIGINT, signal.default_int_handler)
