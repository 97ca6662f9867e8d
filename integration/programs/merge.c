/* merge: memory that is moved away and back, and written next to that.
 *
 * What comes back becomes one mapping with its neighbours, which the kernel then takes from whoever watched them, marks and
 * all. SIGUSR1: move the chunk in the middle away, or back, and write the next version everywhere. /status: the version, or
 * BAD.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE = 4096, CHUNK = 64 * PAGE, CHUNKS = 3 };

static int status;

static void say(const char *what, int number)
{
    char text[64];
    int n = snprintf(text, sizeof text, "%s %d\n", what, number);
    if (pwrite(status, text, n, 0) != n)
        _exit(3);
}

int main(void)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    sigprocmask(SIG_BLOCK, &set, NULL);
    status = open("/status", O_RDWR | O_CREAT | O_TRUNC, 0644);
    char *arena = mmap(NULL, CHUNKS * CHUNK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char *aside = mmap(NULL, CHUNK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (status < 0 || arena == MAP_FAILED || aside == MAP_FAILED)
        return 1;
    char *at[CHUNKS] = {arena, arena + CHUNK, arena + 2 * CHUNK};
    for (int version = 1;; version++) {
        if (version > 1) {
            char *to = at[1] == aside ? arena + CHUNK : aside;
            if (mremap(at[1], CHUNK, CHUNK, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to)
                return 4;
            at[1] = to;
        }
        for (int page = 0; page < CHUNKS * CHUNK / PAGE; page++) {
            char *byte = at[page * PAGE / CHUNK] + page * PAGE % CHUNK;
            if (*byte != version - 1) {
                say("BAD", page);
                return 2;
            }
            *byte = version;
        }
        say("version", version);
        int signal;
        if (sigwait(&set, &signal))
            return 5;
    }
}
