// labels NEXT OTHER: two threads that have asked for labels of SELinux for what they make next (OTHER for the first's
// files, NEXT else), and a listening socket that had none to ask for. Tells the label of its session keyring, and whether
// it may read /secret, again and again.
#include <arpa/inet.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#define KEYCTL_GET_SECURITY 17
#define SESSION_KEYRING (-3)

static void ask(const char *attribute, const char *label)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/thread-self/attr/%s", attribute);
    int fd = open(path, O_WRONLY);
    if (fd < 0 || write(fd, label, strlen(label)) < 0) {
        perror(path);
        exit(1);
    }
    close(fd);
}

static void *second(void *next)
{
    ask("fscreate", next);
    pause();
    return NULL;
}

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    if (listener < 0 || listen(listener, 1) < 0)
        return 1;
    pthread_t thread;
    if (pthread_create(&thread, NULL, second, argv[1]))
        return 1;
    ask("exec", argv[1]);
    ask("keycreate", argv[1]);
    ask("sockcreate", argv[1]);
    ask("fscreate", argv[2]);
    char key[256] = "none";
    syscall(SYS_keyctl, KEYCTL_GET_SECURITY, SESSION_KEYRING, key, sizeof key);
    printf("keyring %s\n", key);
    for (;;) {
        char byte;
        int fd = open("/secret", O_RDONLY);
        puts(fd >= 0 && read(fd, &byte, 1) == 1 ? "told" : "denied");
        fflush(stdout);
        close(fd);
        usleep(200000);
    }
}
