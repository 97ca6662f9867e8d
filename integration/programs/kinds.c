/* kinds WORKERS: processes that make, use and drop resources of many kinds all the time, at random, and check that each
 * does what it should. What goes wrong ends the whole with a line that begins with BAD; else the file /status counts.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <mqueue.h>
#include <netinet/in.h>
#include <pthread.h>
#include <pty.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/msg.h>
#include <sys/prctl.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static atomic_ulong *counts;
static int me;
static unsigned seed;

static unsigned below(unsigned n)
{
    seed = seed * 1103515245u + 12345u;
    return (seed >> 16) % n;
}

static void bad(int line, const char *what)
{
    char text[200];
    int n = snprintf(text, sizeof text, "BAD worker %d line %d: %s (%s)\n", me, line, what, strerror(errno));
    int fd = open("/status", O_WRONLY | O_CREAT | O_APPEND, 0644);
    if (fd >= 0 && write(fd, text, (size_t)n) < 0)
        _exit(2);
    kill(0, SIGKILL);
    _exit(1);
}
#define GOOD(cond) ((cond) ? (void)0 : bad(__LINE__, #cond))

/* A while, mostly short: so that somebody looks at each state now and then. */
static void pass_time(void)
{
    usleep(below(4) ? below(300) : below(8000));
}

static void pipes(void)
{
    int p[2];
    char text[64];
    GOOD(!pipe2(p, below(2) ? O_NONBLOCK : 0));
    GOOD(write(p[1], "hello", 5) == 5);
    pass_time();
    GOOD(read(p[0], text, sizeof text) == 5 && !memcmp(text, "hello", 5));
    close(p[below(2)]);
    pass_time();
    close(p[0]), close(p[1]);
}

static void passing(void)
{
    int s[2], p[2];
    GOOD(!socketpair(AF_UNIX, below(2) ? SOCK_DGRAM : SOCK_STREAM, 0, s));
    GOOD(!pipe(p));
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control;
    char byte = 'x';
    struct iovec data = {&byte, 1};
    struct msghdr m = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    struct cmsghdr *c = CMSG_FIRSTHDR(&m);
    c->cmsg_level = SOL_SOCKET, c->cmsg_type = SCM_RIGHTS, c->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(c), &p[1], sizeof(int));
    GOOD(sendmsg(s[0], &m, 0) == 1);
    close(p[1]);
    pass_time();
    GOOD(recvmsg(s[1], &m, 0) == 1);
    int end;
    memcpy(&end, CMSG_DATA(CMSG_FIRSTHDR(&m)), sizeof end);
    GOOD(write(end, "way", 3) == 3);
    close(end);
    char text[8];
    GOOD(read(p[0], text, sizeof text) == 3);
    GOOD(read(p[0], text, sizeof text) == 0);
    close(p[0]), close(s[0]), close(s[1]);
}

static void listening(void)
{
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    int length = snprintf(to.sun_path + (me & 1), 90, "%s%d.sock", me & 1 ? "kinds" : "/tmp/", me);
    socklen_t size = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + (me & 1) + (unsigned)length + !(me & 1));
    int l = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), c = socket(AF_UNIX, SOCK_STREAM, 0);
    if (!(me & 1))
        unlink(to.sun_path);
    /* Whoever looks at a socket from outside holds it for a moment, and its name with it. */
    for (int tries = 0; bind(l, (struct sockaddr *)&to, size); tries++) {
        GOOD(errno == EADDRINUSE && tries < 200);
        usleep(1000);
    }
    GOOD(!listen(l, 4));
    pass_time();
    GOOD(!connect(c, (struct sockaddr *)&to, size));
    pass_time();
    int a = accept(l, NULL, NULL);
    GOOD(a >= 0 && write(a, "abc", 3) == 3);
    pass_time();
    char text[8];
    GOOD(read(c, text, sizeof text) == 3);
    close(a), close(c), close(l);
}

static void tcp(void)
{
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof at;
    int l = socket(AF_INET, SOCK_STREAM, 0), c = socket(AF_INET, SOCK_STREAM, 0);
    GOOD(!bind(l, (struct sockaddr *)&at, size) && !listen(l, 4));
    GOOD(!getsockname(l, (struct sockaddr *)&at, &size));
    GOOD(!connect(c, (struct sockaddr *)&at, size));
    int a = accept(l, NULL, NULL);
    GOOD(a >= 0);
    close(l);
    GOOD(write(a, "data", 4) == 4);
    pass_time();
    char text[8];
    GOOD(read(c, text, sizeof text) == 4);
    shutdown(a, SHUT_WR);
    pass_time();
    GOOD(read(c, text, sizeof text) == 0);
    close(c);
    pass_time();
    close(a);
}

static void udp(void)
{
    struct sockaddr_in6 at = {.sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT};
    socklen_t size = sizeof at;
    int s = socket(AF_INET6, SOCK_DGRAM, 0);
    if (bind(s, (struct sockaddr *)&at, size)) {
        close(s);
        return;
    }
    GOOD(!getsockname(s, (struct sockaddr *)&at, &size));
    if (below(2))
        GOOD(!connect(s, (struct sockaddr *)&at, size));
    pass_time();
    close(s);
}

static void files(void)
{
    char path[64], other[64];
    snprintf(path, sizeof path, "/tmp/file%d", me);
    snprintf(other, sizeof other, "/tmp/other%d", me);
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    GOOD(fd >= 0 && write(fd, "0123456789", 10) == 10);
    GOOD(!flock(fd, LOCK_EX));
    pass_time();
    switch (below(4)) {
    case 0: GOOD(!unlink(path)); break;
    case 1: GOOD(!rename(path, other)); break;
    case 2: GOOD(!ftruncate(fd, 5) && !ftruncate(fd, 10)); break;
    default: GOOD(!link(path, other) || errno == EEXIST); break;
    }
    pass_time();
    char text[16];
    GOOD(pread(fd, text, sizeof text, 0) == 10 && !memcmp(text, "01234", 5));
    GOOD(lseek(fd, 0, SEEK_CUR) == 10);
    unlink(path), unlink(other);
    pass_time();
    close(fd);
    fd = open("/tmp", O_TMPFILE | O_RDWR, 0600);
    if (fd >= 0) {
        GOOD(write(fd, "tmp", 3) == 3);
        pass_time();
        GOOD(pread(fd, text, sizeof text, 0) == 3);
        close(fd);
    }
}

static void memory(void)
{
    size_t size = (1 + below(64)) << 12;
    int fd = memfd_create("kinds", MFD_ALLOW_SEALING);
    GOOD(fd >= 0 && !ftruncate(fd, (off_t)size));
    char *a = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    char *b = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    GOOD(a != MAP_FAILED && b != MAP_FAILED);
    char value = (char)below(256);
    memset(a, value, size), memset(b, value, size);
    pass_time();
    b = mremap(b, size, size * 2, MREMAP_MAYMOVE);
    GOOD(b != MAP_FAILED && b[size - 1] == value && !mprotect(b, 4096, PROT_READ));
    pass_time();
    GOOD(a[0] == value && a[size - 1] == value && b[0] == value && b[size] == 0);
    munmap(a, size), munmap(b, size * 2);
    close(fd);
    int exe = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    char *code = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, exe, 0);
    close(exe);
    pass_time();
    GOOD(code != MAP_FAILED && code[1] == 'E');
    munmap(code, 4096);
}

static void events(void)
{
    int e = eventfd(3, below(2) ? EFD_SEMAPHORE : 0), t = timerfd_create(CLOCK_MONOTONIC, 0), p = epoll_create1(0);
    struct itimerspec soon = {.it_value.tv_nsec = 2000000, .it_interval.tv_nsec = 3000000};
    GOOD(e >= 0 && t >= 0 && p >= 0 && !timerfd_settime(t, 0, &soon, NULL));
    struct epoll_event in = {EPOLLIN | (below(2) ? EPOLLET : 0), {.u64 = 7}};
    GOOD(!epoll_ctl(p, EPOLL_CTL_ADD, e, &in) && !epoll_ctl(p, EPOLL_CTL_ADD, t, &in));
    struct epoll_event out[4];
    GOOD(epoll_wait(p, out, 4, 5000) >= 1 && out[0].data.u64 == 7);
    pass_time();
    unsigned long value;
    GOOD(read(e, &value, 8) == 8);
    GOOD(read(t, &value, 8) == 8 && value >= 1);
    if (below(2))
        close(e), close(p);
    else
        close(p), close(e);
    pass_time();
    close(t);
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGRTMIN + 3);
    sigprocmask(SIG_BLOCK, &set, NULL);
    int s = signalfd(-1, &set, 0);
    GOOD(s >= 0);
    union sigval with = {.sival_int = 42};
    GOOD(!sigqueue(getpid(), SIGRTMIN + 3, with));
    pass_time();
    struct signalfd_siginfo info;
    GOOD(read(s, &info, sizeof info) == sizeof info && info.ssi_int == 42);
    close(s);
}

static void watches(void)
{
    char dir[64], path[80];
    snprintf(dir, sizeof dir, "/tmp/dir%d", me);
    snprintf(path, sizeof path, "%s/x", dir);
    GOOD(!mkdir(dir, 0700) || errno == EEXIST);
    int i = inotify_init1(0);
    GOOD(i >= 0 && inotify_add_watch(i, dir, IN_CREATE | IN_DELETE_SELF) >= 0);
    pass_time();
    int fd = open(path, O_CREAT | O_WRONLY, 0600);
    GOOD(fd >= 0);
    close(fd);
    pass_time();
    char text[256];
    GOOD(read(i, text, sizeof text) >= (ssize_t)sizeof(struct inotify_event));
    GOOD(((struct inotify_event *)(void *)text)->mask & IN_CREATE);
    GOOD(!unlink(path));
    if (below(2))
        GOOD(!rmdir(dir));
    pass_time();
    close(i);
}

static void *thread(void *arg)
{
    prctl(PR_SET_NAME, "kinds-thread");
    pass_time();
    return arg;
}

static void threads(void)
{
    pthread_t t[4];
    for (int i = 0; i < 4; i++)
        GOOD(!pthread_create(&t[i], NULL, thread, t + i));
    for (int i = 0; i < 4; i++) {
        void *got;
        GOOD(!pthread_join(t[i], &got) && got == t + i);
    }
}

static void children(void)
{
    char *argv[] = {"/bin/true", NULL};
    pid_t kid = below(2) ? vfork() : fork();
    GOOD(kid >= 0);
    if (!kid) {
        execv(argv[0], argv);
        _exit(9);
    }
    int handle = (int)syscall(SYS_pidfd_open, kid, 0), status;
    pass_time();
    GOOD(waitpid(kid, &status, 0) == kid && status == 0);
    if (handle >= 0)
        close(handle);
    kid = fork();
    if (!kid) {
        if (below(2))
            setsid();
        pass_time();
        _exit(5);
    }
    GOOD(waitpid(kid, &status, 0) == kid && WEXITSTATUS(status) == 5);
}

static void terminals(void)
{
    int master, slave;
    struct winsize size = {24, 80, 0, 0};
    if (openpty(&master, &slave, NULL, NULL, &size))
        return;
    pass_time();
    GOOD(!ioctl(slave, TIOCGWINSZ, &size) && size.ws_col == 80);
    if (below(2))
        close(master), close(slave);
    else
        close(slave), close(master);
}

static void ipc(void)
{
    int m = shmget(IPC_PRIVATE, 8192, IPC_CREAT | 0600), q = msgget(IPC_PRIVATE, IPC_CREAT | 0600);
    int s = semget(IPC_PRIVATE, 2, IPC_CREAT | 0600);
    GOOD(m >= 0 && q >= 0 && s >= 0);
    char *at = shmat(m, NULL, 0);
    GOOD(at != (void *)-1);
    strcpy(at, "shared");
    if (below(2))
        GOOD(!shmctl(m, IPC_RMID, NULL));
    struct {
        long type;
        char text[8];
    } message = {3, "queued"};
    GOOD(!msgsnd(q, &message, 8, 0));
    pass_time();
    GOOD(!strcmp(at, "shared") && msgrcv(q, &message, 8, 3, 0) == 8 && !strcmp(message.text, "queued"));
    shmdt(at);
    shmctl(m, IPC_RMID, NULL), msgctl(q, IPC_RMID, NULL), semctl(s, 0, IPC_RMID);
    char name[32];
    snprintf(name, sizeof name, "/kinds%d", me);
    mqd_t d = mq_open(name, O_CREAT | O_RDWR, 0600, NULL);
    if (d != (mqd_t)-1) {
        GOOD(!mq_send(d, "posix", 6, 2));
        pass_time();
        char text[8192];
        unsigned priority;
        GOOD(mq_receive(d, text, sizeof text, &priority) == 6 && priority == 2);
        mq_close(d);
        mq_unlink(name);
    }
}

static void (*const all[])(void) = {pipes, passing, listening, tcp, udp, files, memory, events, watches,
                                    threads, children, terminals, ipc};

int main(int argc, char **argv)
{
    int workers = argc > 1 ? atoi(argv[1]) : 4;
    counts = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    signal(SIGPIPE, SIG_IGN);
    for (me = 1; me <= workers; me++)
        if (!fork()) {
            seed = (unsigned)me * 7919u;
            for (;;) {
                int kind = argc > 2 ? atoi(argv[2]) : (int)below(sizeof all / sizeof *all);
                all[kind]();
                atomic_fetch_add(counts, 1);
            }
        }
    for (;;) {
        int fd = open("/status.new", O_WRONLY | O_CREAT | O_TRUNC, 0644);
        if (fd >= 0) {
            dprintf(fd, "%lu\n", atomic_load(counts));
            close(fd);
            struct stat found;
            char text[4] = "";
            int old = open("/status", O_RDONLY);
            if (old >= 0 && (read(old, text, 3) < 0 || fstat(old, &found)))
                return 2;
            if (strncmp(text, "BAD", 3))
                rename("/status.new", "/status");
            close(old);
        }
        usleep(20000);
        int status;
        if (waitpid(-1, &status, WNOHANG) > 0)
            return 3;
    }
}
