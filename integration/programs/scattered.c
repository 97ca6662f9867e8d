/* scattered MIB: again and again one page of each 2 MiB is looked at, from the last to the first. /status says how often, or
 * BAD. */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    size_t pages = atol(argv[1]) * 256;
    uint64_t *p = mmap(NULL, pages * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int status = open("/status", O_WRONLY | O_CREAT | O_TRUNC, 0644);
    if (argc < 2 || p == MAP_FAILED || status < 0)
        return 1;
    madvise(p, pages * 4096, MADV_NOHUGEPAGE);
    for (size_t i = 0; i < pages; i++)
        p[i * 512] = i + 1;
    for (long round = 1;; round++) {
        for (size_t i = pages; i >= 512; i -= 512)
            if (p[(i - 300) * 512] != i - 300 + 1) {
                dprintf(status, "BAD page %zu\n", i - 300);
                return 2;
            }
        char text[32];
        int n = snprintf(text, sizeof text, "round %09ld\n", round);
        if (pwrite(status, text, n, 0) != n)
            return 3;
        nanosleep(&(struct timespec){ .tv_nsec = 2000000 }, NULL);
    }
}
