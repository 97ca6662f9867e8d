// Tells whoever started it that it is ready: notify MESSAGE..., each of them a datagram to $NOTIFY_SOCKET. Then it stays.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    const char *path = getenv("NOTIFY_SOCKET");
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    int s = socket(AF_UNIX, SOCK_DGRAM, 0);
    if (!path || strlen(path) >= sizeof to.sun_path)
        return puts("no NOTIFY_SOCKET"), 1;
    strcpy(to.sun_path, path);
    for (int i = 1; i < argc; i++)
        if (sendto(s, argv[i], strlen(argv[i]), 0, (struct sockaddr *)&to, sizeof to) < 0)
            return perror(path), 1;
    printf("said it to %s\n", path);
    fflush(stdout);
    pause();
    return 0;
}
