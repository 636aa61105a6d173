# A process with so many MiB of written pages, which forks: prints the nanoseconds until each fork(2) has returned.
import json, os, sys, time

size = int(sys.argv[1]) << 20
memory = bytearray(size)
for at in range(0, size, 4096):
    memory[at] = 1
taken = []
for _ in range(int(sys.argv[2])):
    start = time.perf_counter_ns()
    child = os.fork()
    if child == 0:
        os._exit(0)
    taken.append(time.perf_counter_ns() - start)
    os.waitpid(child, 0)
print(json.dumps(taken))
