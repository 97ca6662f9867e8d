/* A client that writes to redis as fast as it's answered, over one unix connection that it keeps:
 *   load SOCKET
 * sets load:1, load:2, ... and prints each number, a line of its own, only after redis has acknowledged it. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static void all(int fd, const char *p, size_t n)
{
    while (n) {
        ssize_t w = write(fd, p, n);
        if (w < 0) {
            perror("write");
            exit(1);
        }
        p += w;
        n -= (size_t)w;
    }
}

int main(int argc, char **argv)
{
    if (argc != 2)
        return 2;
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    snprintf(a.sun_path, sizeof a.sun_path, "%s", argv[1]);
    int s = socket(AF_UNIX, SOCK_STREAM, 0);
    while (connect(s, (struct sockaddr *)&a, sizeof a)) {
        if (errno != ENOENT && errno != ECONNREFUSED) {
            perror("connect");
            return 1;
        }
        usleep(10000);
    }
    for (unsigned long i = 1;; i++) {
        char line[128], answer[5];
        all(s, line, (size_t)snprintf(line, sizeof line, "SET load:%lu %lu\r\n", i, i * 7));
        for (size_t n = 0; n < sizeof answer;) {
            ssize_t r = read(s, answer + n, sizeof answer - n);
            if (r <= 0) {
                perror("read");
                return 1;
            }
            n += (size_t)r;
        }
        if (memcmp(answer, "+OK\r\n", 5)) {
            fprintf(stderr, "redis: %.5s\n", answer);
            return 1;
        }
        all(1, line, (size_t)snprintf(line, sizeof line, "%lu\n", i));
    }
}
