"""What `integration/bench` and `integration/speed.py` share: a program that fills memory, and the cost of writing it."""
import os
import resource
import threading

FILL = r"""
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>
int main(int argc, char **argv)
{
    size_t n = argc > 1 ? (size_t)atol(argv[1]) << 20 : 0;
    uint64_t *p = malloc(n + 8), x = 88172645463325252u;
    for (size_t i = 0; i < n / 8; i++)
        x ^= x << 13, x ^= x >> 7, x ^= x << 17, p[i] = x;
    if (creat("/filled", 0644) < 0)
        return 1;
    for (;;)
        pause();
}
"""


def used():
    """Processor time of this process, and of all that it has waited for, in seconds."""
    return sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, (resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF)))


def write(path, megabytes, sync=False):
    """Writes so much into the page cache on two threads, and on to the disk if asked."""
    data = os.urandom(1 << 20)

    def half(first):
        for at in range(first, first + megabytes // 2):
            os.pwrite(file, data, at << 20)

    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    threads = [threading.Thread(target=half, args=(first,)) for first in (0, megabytes // 2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if sync:
        os.fsync(file)
    os.close(file)


def floor(path, megabytes):
    """Processor time of it."""
    before = used()
    write(path, megabytes)
    spent = used() - before
    os.unlink(path)
    return spent
