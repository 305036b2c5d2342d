"""A process that has imported torch and never trained: it forks workers, which one that has run autograd may not.

Reads one JSON request a line, {"start": arguments, "environment": {}} or {"poll"|"wait"|"kill": pid}; answers a number.
"""

import importlib.util
import json
import os
import signal
import sys
import traceback
from pathlib import Path

import torch

spec = importlib.util.spec_from_file_location("lynceus_test_worker", Path(__file__).with_name("worker.py"))
worker = importlib.util.module_from_spec(spec)
sys.modules["lynceus_test_worker"] = worker
spec.loader.exec_module(worker)
torch.set_num_threads(1)


def run(arguments, environment):
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)  # stdout is for answers
        os.environ.update(environment)
        sys.argv = ["worker.py", *arguments]
        worker.main()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def answer(request):
    if "start" in request:
        pid = os.fork()
        if not pid:
            run(request["start"], request["environment"])
        return pid
    if "poll" in request:
        return int(os.waitid(os.P_PID, request["poll"], os.WEXITED | os.WNOHANG | os.WNOWAIT) is None)
    if "kill" in request:
        os.kill(request["kill"], signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(request.get("wait", request.get("kill")), 0)[1])


for line in sys.stdin:
    print(answer(json.loads(line)), flush=True)
