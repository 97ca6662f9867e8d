/* giveback: private pages of a file that are given back (MADV_DONTNEED) between two looks at the memory are the file's again.
 * Steps come as files: /go1 gives back, /go2 has it look. What it has to say is in /status. */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { SIZE = 4 << 20, HALF = SIZE / 2 };

static void say(const char *text)
{
    int fd = open("/status.new", O_CREAT | O_WRONLY | O_TRUNC, 0644);
    if (fd < 0 || write(fd, text, strlen(text)) < 0 || close(fd) < 0 || rename("/status.new", "/status") < 0)
        _exit(3);
}

static void wait_for(const char *path)
{
    while (access(path, F_OK) < 0)
        usleep(1000);
}

static int is(const char *p, char c, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (p[i] != c)
            return 0;
    return 1;
}

int main(void)
{
    int fd = open("/file", O_CREAT | O_RDWR, 0644);
    char *block = malloc(SIZE);
    memset(block, 'A', SIZE);
    if (fd < 0 || write(fd, block, SIZE) != SIZE)
        return 1;
    free(block);
    char *p = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    if (p == MAP_FAILED)
        return 2;
    memset(p, 'B', SIZE);
    say("ready");
    wait_for("/go1");
    if (madvise(p, HALF, MADV_DONTNEED))
        return 4;
    say("given back");
    wait_for("/go2");
    say(!is(p, 'A', HALF) ? "BAD: given back, and there again" : is(p + HALF, 'B', HALF) ? "good" : "BAD: lost");
    for (;;)
        pause();
}
