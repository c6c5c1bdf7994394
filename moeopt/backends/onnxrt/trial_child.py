"""Makes a session and its calls within a limit on memory; run as a program, with numpy and ONNX Runtime only.

Reads ``calls.json`` in the working directory. The first line that it prints says that its time begins, the last is
"good", "memory", "time" or "other".
"""

import json
import os
import sys
import threading
import time
from typing import Any

NUMPY = {1: "f4", 2: "u1", 3: "i1", 4: "u2", 5: "i2", 6: "i4", 7: "i8", 9: "?", 10: "f2", 11: "f8", 12: "u4", 13: "u8"}
"""ONNX's element types that numpy has; the others travel as the unsigned integers of their width."""
MEMORY = ("bad alloc", "bad_alloc", "Failed to allocate", "out of memory", "smaller than requested")


def main() -> None:
    import numpy
    import onnxruntime as ort

    with open("calls.json") as file:
        said = json.load(file)
    print("started", flush=True)
    threading.Thread(target=limit_time, args=(said["seconds"],), daemon=True).start()
    limit_memory(said["bytes"])
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = said["threads"]
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", said["folder"])
    for key, value in said["entries"].items():
        options.add_session_config_entry(key, value)
    if said["operator"]:
        key, value, library = said["operator"]
        options.add_session_config_entry(key, value)
        options.register_custom_ops_library(library)
    try:
        session = ort.InferenceSession(
            said["model"], options, providers=["CPUExecutionProvider"], disabled_optimizers=said["left_out"]
        )
        for call in said["calls"]:
            feeds: dict[str, Any] = {}
            for name, (kind, width, shape, path) in call.items():
                data = numpy.fromfile(path, NUMPY.get(kind, f"u{width}")).reshape(shape)
                feeds[name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(data, kind)
            session.run_with_ort_values(None, feeds)
    except MemoryError:
        print("memory")
    except Exception as err:  # of several classes; the parent meets the same one, with a message of its own
        print("memory" if any(word in str(err) for word in MEMORY) else "other")
    else:
        print("good")


def limit_time(seconds: float) -> None:
    """End this process when ``seconds`` have passed on the clock and as its CPU time, as ``moeopt.limits`` says."""
    clock, cpu = time.monotonic(), time.process_time()
    while min(time.monotonic() - clock, time.process_time() - cpu) < seconds:
        time.sleep(min(max(seconds / 20, 0.005), 0.25))
    os.write(1, b"time\n")
    os._exit(0)


def limit_memory(more: int) -> None:
    """Let this process have ``more`` bytes beside what it has, where the system can hold it to that."""
    try:
        import resource

        with open("/proc/self/statm") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + more, mapped + more))
    except (ImportError, OSError, ValueError):
        pass


if __name__ == "__main__":
    main()
    sys.stdout.flush()
