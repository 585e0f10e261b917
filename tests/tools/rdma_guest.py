"""Run cases inside the virtual machine of rdma-vm, one after the other: what each printed, its time, and what it left behind.

    python rdma_guest.py FOLDER

FOLDER/cases.json is a list of [name, shell command, limit in seconds]; for case i, FOLDER/<i>.json says how it went. Only the
standard library is used, and little of it: to start Python is slow here.
"""

import json
import os
import signal
import subprocess
import sys
import time

#: Seconds that the kernel has to free what a process that ended had of the devices.
SETTLE = 3.0


def packets():
    """Packets that each device has sent."""
    sent = {}
    for device in os.listdir("/sys/class/infiniband"):
        with open(f"/sys/class/infiniband/{device}/ports/1/hw_counters/sent_pkts") as file:
            sent[device] = int(file.read())
    return sent


def resources():
    """Objects of each device: {"rxe0": {"qp": 1, "mr": 0, ...}}. The kernel has some for itself."""
    done = subprocess.run(["rdma", "resource", "show"], capture_output=True, text=True, check=True)
    held = {}
    for line in done.stdout.splitlines():
        _, device, *words = line.split()
        held[device.rstrip(":")] = dict(zip(words[::2], map(int, words[1::2])))
    return held


def members(session):
    """Processes of a session that still run, as "pid name"."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat") as file:
                name, _, rest = file.read().partition(" (")[2].rpartition(") ")
        except OSError:
            continue
        state, _, _, of_session = rest.split()[:4]
        if int(of_session) == session and state != "Z":
            found[int(pid)] = name
    return found


def left_behind(session, before):
    """What a case has left, in words; "" if nothing."""
    end = time.monotonic() + SETTLE
    while members(session) or resources() != before:
        if time.monotonic() > end:
            break
        time.sleep(0.05)
    words = [f"process {pid} ({name})" for pid, name in members(session).items()]
    for device, held in resources().items():
        had = before.get(device, {})
        words += [
            f"{device}: {count} {kind} instead of {had.get(kind)}" for kind, count in held.items() if count != had.get(kind)
        ]
    return ", ".join(words)


def run(command, limit, output):
    """Run one case; how it went."""
    objects, sent = resources(), packets()
    began = time.monotonic()
    with open(output, "wb") as file:
        process = subprocess.Popen(["bash", "-c", command], stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
    seconds = time.monotonic() - began
    left = left_behind(process.pid, objects) if code is not None else ""
    for number, patience in ((signal.SIGTERM, 2), (signal.SIGKILL, 1)):  # a shell may have to tidy up
        for pid in members(process.pid):
            os.kill(pid, number)
        end = time.monotonic() + patience
        while members(process.pid) and time.monotonic() < end:
            process.poll()
            time.sleep(0.02)
    process.wait()
    with open(output, errors="replace") as file:
        text = file.read()
    # a device that was made anew counts from 0
    now = {device: count - sent.get(device, 0) if count >= sent.get(device, 0) else count for device, count in packets().items()}
    return {"code": code, "seconds": seconds, "output": text, "packets": now, "left": left}


def main(folder):
    with open(f"{folder}/cases.json") as file:
        cases = json.load(file)
    for i, (name, command, limit) in enumerate(cases):
        began = time.monotonic()
        print(f"{began:.1f} {name}", end="", flush=True)
        result = run(command, limit, f"/tmp/case-{i}")
        with open(f"{folder}/{i}.part", "w") as file:
            json.dump(result, file)
        os.rename(f"{folder}/{i}.part", f"{folder}/{i}.json")
        print(f": {result['seconds']:.1f} of {time.monotonic() - began:.1f} s", flush=True)
    print(f"{time.monotonic():.1f} done", flush=True)


main(sys.argv[1])
