// System calls, one by one, for tests of seccomp filters: what each of them comes to is printed.
//
//   calls seek N...   lseek(-1, N): EBADF, if no filter has another opinion
//   calls thread      a thread makes a directory; the program prints whether it lives
//   calls old         mkdir(2) by the 32-bit entry, int 0x80
//   calls x32         getppid(2) by its number for x32
//   calls ask         mkdir(2) and what it returned: for agents that answer

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static void *make(void *unused)
{
    (void)unused;
    mkdir("/made", 0755);
    puts("thread");
    return NULL;
}

int main(int argc, char **argv)
{
    setvbuf(stdout, NULL, _IONBF, 0);
    if (argc < 2)
        return 2;
    if (!strcmp(argv[1], "seek")) {
        for (int i = 2; i < argc; i++) {
            syscall(SYS_lseek, -1L, strtoull(argv[i], NULL, 0), 0L);
            printf("%d ", errno);
        }
        puts("");
    } else if (!strcmp(argv[1], "thread")) {
        pthread_t t;
        if (pthread_create(&t, NULL, make, NULL))
            return 3;
        pthread_join(t, NULL);
        puts("main");
    } else if (!strcmp(argv[1], "ask")) {
        long r = syscall(SYS_mkdirat, -100L, "/asked", 0700L);
        printf("%ld %d\n", r, r < 0 ? errno : 0);
#ifdef __x86_64__
    } else if (!strcmp(argv[1], "old")) {
        // The path has to lie where 32 bits reach.
        char *low = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
        if (low == MAP_FAILED)
            return 4;
        strcpy(low, "/old");
        int r;
        __asm__ volatile("int $0x80" : "=a"(r) : "a"(39), "b"(low), "c"(0755) : "memory", "r8", "r9", "r10", "r11");
        printf("%d\n", r);
    } else if (!strcmp(argv[1], "x32")) {
        long r = syscall(0x40000000 | SYS_getppid);
        printf("%ld\n", r < 0 ? -(long)errno : r);
#endif
    } else
        return 2;
    return 0;
}
