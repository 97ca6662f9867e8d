/* A server of streams: on every connection to port 7000 it sends a known sequence of bytes, and checks that it hears
 * the same, both at once, until the other side ends. Then it says how much it has heard, and ends too.
 *
 *   byte n of a stream is TABLE[n % PERIOD];  TABLE is the top byte of x = x * 1664525 + 1013904223, from x = 1
 *   trailer: 16 hexadecimal digits
 */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define PERIOD 65521
#define MOST 64

static unsigned char table[PERIOD * 2];

struct stream {
    int fd;
    uint64_t sent, heard;
    int ended;
};

static void die(const char *what)
{
    printf("stream: %s: %s\n", what, strerror(errno));
    fflush(stdout);
    exit(1);
}

static void hear(struct stream *s)
{
    static unsigned char buffer[32768];
    ssize_t n = recv(s->fd, buffer, sizeof buffer, MSG_DONTWAIT);
    if (n < 0 && errno != EAGAIN && errno != EINTR)
        die("recv");
    if (n == 0)
        s->ended = 1;
    if (n > 0 && memcmp(buffer, table + s->heard % PERIOD, (size_t)n)) {
        printf("stream: wrong bytes after %llu\n", (unsigned long long)s->heard);
        fflush(stdout);
        exit(1);
    }
    if (n > 0)
        s->heard += (uint64_t)n;
}

static void speak(struct stream *s)
{
    ssize_t n = send(s->fd, table + s->sent % PERIOD, 30000, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n < 0 && errno != EAGAIN && errno != EINTR)
        die("send");
    if (n > 0)
        s->sent += (uint64_t)n;
}

static void finish(struct stream *s)
{
    char trailer[17];
    snprintf(trailer, sizeof trailer, "%016llx", (unsigned long long)s->heard);
    if (send(s->fd, trailer, 16, MSG_NOSIGNAL) != 16)
        die("trailer");
    shutdown(s->fd, SHUT_WR);
    char rest;
    while (recv(s->fd, &rest, 1, 0) > 0)
        ;
    close(s->fd);
    printf("heard %llu\n", (unsigned long long)s->heard);
    fflush(stdout);
}

int main(void)
{
    uint32_t x = 1;
    for (int i = 0; i < PERIOD; i++) {
        x = x * 1664525u + 1013904223u;
        table[i] = table[i + PERIOD] = (unsigned char)(x >> 24);
    }
    int listener = socket(AF_INET6, SOCK_STREAM, 0), one = 1;
    struct sockaddr_in6 a = {.sin6_family = AF_INET6, .sin6_port = htons(7000)};
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (void *)&a, sizeof a) || listen(listener, MOST))
        die("listen");
    printf("ready\n");
    fflush(stdout);
    static struct stream streams[MOST];
    struct pollfd polled[MOST + 1];
    int count = 0;
    for (;;) {
        polled[0] = (struct pollfd){listener, POLLIN, 0};
        for (int i = 0; i < count; i++)
            polled[i + 1] = (struct pollfd){streams[i].fd, POLLIN | POLLOUT, 0};
        if (poll(polled, (nfds_t)count + 1, -1) < 0 && errno != EINTR)
            die("poll");
        for (int i = count - 1; i >= 0; i--) {
            if (polled[i + 1].revents & ~POLLOUT)
                hear(&streams[i]);
            if (streams[i].ended) {
                finish(&streams[i]);
                streams[i] = streams[--count];
            } else if (polled[i + 1].revents & POLLOUT) {
                speak(&streams[i]);
            }
        }
        if (polled[0].revents && count < MOST) {
            int fd = accept(listener, NULL, NULL);
            if (fd < 0)
                die("accept");
            streams[count++] = (struct stream){fd, 0, 0, 0};
        }
    }
}
