/* A program with memory of many kinds: sets it up, prints "ready", waits for a byte, looks whether all is as it was. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096ul

static char data[3 * PAGE] = "data";
static char bss[300 * PAGE];
static const char text[] = "constant";

static void fail(const char *what)
{
    dprintf(1, "%s\n", what);
    _exit(1);
}
#define CHECK(c)                                                                                                       \
    if (!(c))                                                                                                          \
    fail(#c)

static void *map(size_t pages, int prot, int flags, int fd, off_t at)
{
    void *p = mmap(0, pages * PAGE, prot, flags, fd, at);
    if (p == MAP_FAILED)
        fail("mmap");
    return p;
}

/* The VmFlags of the mapping that begins at p, or those of none. */
static int has_flag(void *p, const char *flag)
{
    char line[512], start[32];
    int here = 0, found = 0;
    snprintf(start, sizeof start, "%lx-", (unsigned long)p);
    FILE *f = fopen("/proc/self/smaps", "r");
    while (f && fgets(line, sizeof line, f)) {
        if (strchr(line, '-') && strchr(line, '-') < strchr(line, ' '))
            here = !strncmp(line, start, strlen(start));
        if (here && !strncmp(line, "VmFlags:", 8))
            found = strstr(line, flag) != 0;
    }
    if (f)
        fclose(f);
    return found;
}

static int deep(int n)
{
    volatile char here[PAGE];
    here[0] = (char)n;
    return n ? deep(n - 1) + here[0] - (char)n : 0;
}

int main(int argc, char **argv)
{
    if (argc < 2)
        fail("usage");
    char *anon = map(64, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (int i = 0; i < 64; i += 3)
        memset(anon + i * PAGE, i + 1, PAGE);
    mprotect(anon + 9 * PAGE, PAGE, PROT_READ);
    mprotect(anon + 12 * PAGE, PAGE, PROT_NONE);

    int fd = open(argv[1], O_RDWR | O_CREAT, 0600);
    char block[PAGE];
    for (int i = 0; i < 8; i++) {
        memset(block, 'a' + i, PAGE);
        if (write(fd, block, PAGE) != (ssize_t)PAGE)
            fail("write");
    }
    char *priv = map(8, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    priv[2 * PAGE] = 'X';
    char *share = map(4, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 4 * PAGE);
    close(fd);
    fd = open(argv[1], O_RDONLY);
    char *readonly = map(1, PROT_READ, MAP_SHARED, fd, 0);
    close(fd);

    char *shared = map(16, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    shared[5 * PAGE] = 5;
    char *none = map(1000, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    char *hole = map(16, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    hole[0] = hole[8 * PAGE] = 1;

    char *advised = map(4, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    madvise(advised, 4 * PAGE, MADV_DONTFORK);
    madvise(advised, 4 * PAGE, MADV_DONTDUMP);
    char *wiped = map(4, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    madvise(wiped, 4 * PAGE, MADV_WIPEONFORK);
    wiped[0] = 7;
    char *locked = map(4, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int lock = mlock(locked, 4 * PAGE) == 0;
    locked[PAGE] = 4;
    char *guarded = map(8, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memset(guarded, 3, 8 * PAGE);
    int guard = madvise(guarded + 2 * PAGE, 2 * PAGE, 102) == 0;
    char *thp = aligned_alloc(2 << 20, 4 << 20);
    madvise(thp, 4 << 20, MADV_HUGEPAGE);
    memset(thp, 9, 4 << 20);

    char *heap = malloc(100);
    strcpy(heap, "heap");
    char *top = sbrk(0);
    bss[299 * PAGE] = 2;
    data[2 * PAGE] = 1;
    volatile int local = 4711;
    deep(20);

    munmap(hole + 4 * PAGE, 4 * PAGE);
    char *down = map(600, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    munmap(down, 600 * PAGE);
    down = mmap(down + 580 * PAGE, 2 * PAGE, PROT_READ | PROT_WRITE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_GROWSDOWN | MAP_FIXED_NOREPLACE, -1, 0);
    if (down == MAP_FAILED)
        fail("growsdown");
    down[0] = 1;

    if (write(1, "ready\n", 6) != 6)
        return 1;
    char byte;
    if (read(0, &byte, 1) != 1)
        fail("read");

    down[-8 * (long)PAGE] = 1;
    CHECK(down[0] == 1 && has_flag(down - 8 * (long)PAGE, " gd"));
    CHECK(local == 4711 && !strcmp(data, "data") && !strcmp(text, "constant") && !strcmp(heap, "heap"));
    CHECK(bss[299 * PAGE] == 2 && bss[0] == 0 && data[2 * PAGE] == 1);
    CHECK(sbrk(0) == top);
    CHECK(sbrk(PAGE) == top);
    top[0] = 1;
    for (int i = 0; i < 64; i++) {
        if (i == 12)
            mprotect(anon + i * PAGE, PAGE, PROT_READ);
        CHECK(anon[i * PAGE] == (i % 3 ? 0 : i + 1));
        CHECK(anon[i * PAGE + PAGE - 1] == (i % 3 ? 0 : i + 1));
    }
    CHECK(priv[0] == 'a' && priv[2 * PAGE] == 'X' && priv[2 * PAGE + 1] == 'c' && priv[7 * PAGE] == 'h');
    share[PAGE] = 'S';
    fd = open(argv[1], O_RDWR);
    CHECK(pread(fd, block, 1, 5 * PAGE) == 1 && block[0] == 'S');
    CHECK(pread(fd, block, 1, 2 * PAGE) == 1 && block[0] == 'c');
    CHECK(readonly[0] == 'a' && mprotect(readonly, PAGE, PROT_READ | PROT_WRITE) == -1);
    CHECK(shared[5 * PAGE] == 5 && shared[0] == 0);
    CHECK(has_flag(none, " nr") && mprotect(none, PAGE, PROT_READ) == 0 && none[0] == 0);
    CHECK(hole[0] == 1 && hole[8 * PAGE] == 1 && mincore(hole + 4 * PAGE, 4 * PAGE, (void *)block) == -1);
    CHECK(has_flag(advised, " dc") && has_flag(advised, " dd"));
    CHECK(has_flag(wiped, " wf") && wiped[0] == 7);
    CHECK(!lock || (has_flag(locked, " lo") && locked[PAGE] == 4));
    CHECK(guarded[PAGE] == 3 && guarded[4 * PAGE] == 3);
    int pipes[2];
    if (pipe(pipes))
        fail("pipe");
    CHECK(!guard || (write(pipes[1], guarded + 2 * PAGE, 1) == -1 && write(pipes[1], guarded, 1) == 1));
    CHECK(thp[0] == 9 && thp[(4 << 20) - 1] == 9 && has_flag(thp, " hg"));
    deep(200);
    struct timespec ts;
    CHECK(clock_gettime(CLOCK_MONOTONIC, &ts) == 0 && ts.tv_sec > 0 && time(0) > 1600000000);
    char name[4096];
    long n = readlink("/proc/self/exe", name, sizeof name - 1);
    CHECK(n > 0 && n >= 6 && !memcmp(name + n - 6, "victim", 6));
    fd = open("/proc/self/cmdline", O_RDONLY);
    n = read(fd, name, sizeof name);
    CHECK(n > 0 && !strcmp(name, argv[0]) && !strcmp(name + strlen(name) + 1, argv[1]));
    dprintf(1, "ok\n");
    return 0;
}
