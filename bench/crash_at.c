/* Ends a process at the n-th file operation of a save; loaded with LD_PRELOAD, below Python, torch and Rust alike.

       cc -O2 -shared -fPIC -o crash_at.so crash_at.c -ldl

   Nothing happens until a process calls crash_at_arm(). From then on every call that changes something below a path
   prefix is an operation: opening for writing, write, truncate, sync, rename, mkdir, link, unlink, rmdir. Counting starts
   with the first operation on a path that contains `begin` and stops before the first on one that contains `end`. Each
   is logged before it is done ("<number> <kind> <bytes> <path>\n"); at number `kill_at` the process kills itself instead
   of doing it. Writes through the buffers of C's stdio are not seen: none of the libraries measured uses them. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static char prefix[PATH_MAX], begin_text[256], end_text[256];
static long kill_at, num_operations;
static int log_fd = -1, armed, counting;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

void crash_at_arm(const char *path_prefix, const char *begin, const char *end, long number, const char *log) {
    snprintf(prefix, sizeof prefix, "%s", path_prefix);
    snprintf(begin_text, sizeof begin_text, "%s", begin);
    snprintf(end_text, sizeof end_text, "%s", end);
    kill_at = number;
    log_fd = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    armed = 1;
}

static void operation(const char *kind, const char *path, long bytes) {
    if (strncmp(path, prefix, strlen(prefix)) != 0) return;
    pthread_mutex_lock(&lock);
    if (*end_text && strstr(path, end_text)) armed = 0;
    if (armed && !counting && strstr(path, begin_text)) counting = 1;
    if (armed && counting) {
        char line[PATH_MAX + 64];
        int length = snprintf(line, sizeof line, "%ld %s %ld %s\n", ++num_operations, kind, bytes, path);
        if (log_fd >= 0 && syscall(SYS_write, log_fd, line, (size_t)length) < 0) abort();
        if (num_operations == kill_at) {
            syscall(SYS_kill, (pid_t)syscall(SYS_getpid), SIGKILL);
            for (;;) pause();
        }
    }
    pthread_mutex_unlock(&lock);
}

static void on_descriptor(const char *kind, int fd, long bytes) {
    if (!armed || fd < 0) return;
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    long length = syscall(SYS_readlinkat, AT_FDCWD, link, path, sizeof path - 1);
    if (length <= 0) return;
    path[length] = 0;
    operation(kind, path, bytes);
}

static void on_path(const char *kind, int folder, const char *name) {
    if (!armed || !name) return;
    char path[2 * PATH_MAX], link[64];
    long length = 0;
    if (*name != '/') {
        if (folder == AT_FDCWD) {
            if (!getcwd(path, PATH_MAX)) return;
            length = (long)strlen(path);
        } else {
            snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
            length = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
            if (length <= 0) return;
        }
        path[length++] = '/';
    }
    snprintf(path + length, sizeof path - (size_t)length, "%s", name);
    operation(kind, path, 0);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define CHANGES(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC | O_APPEND))

#define OPEN(name)                                                                        \
    int name(const char *path, int flags, ...) {                                          \
        va_list rest;                                                                     \
        va_start(rest, flags);                                                            \
        int mode = va_arg(rest, int);                                                     \
        va_end(rest);                                                                     \
        if (CHANGES(flags)) on_path("open", AT_FDCWD, path);                              \
        return ((int (*)(const char *, int, ...))dlsym(RTLD_NEXT, #name))(path, flags, mode); \
    }
#define OPENAT(name)                                                                      \
    int name(int folder, const char *path, int flags, ...) {                              \
        va_list rest;                                                                     \
        va_start(rest, flags);                                                            \
        int mode = va_arg(rest, int);                                                     \
        va_end(rest);                                                                     \
        if (CHANGES(flags)) on_path("open", folder, path);                                \
        return ((int (*)(int, const char *, int, ...))dlsym(RTLD_NEXT, #name))(folder, path, flags, mode); \
    }
#define FOPEN(name)                                                                       \
    FILE *name(const char *path, const char *mode) {                                      \
        if (strpbrk(mode, "wa+")) on_path("open", AT_FDCWD, path);                        \
        return REAL(name)(path, mode);                                                    \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
FOPEN(fopen)
FOPEN(fopen64)

int creat(const char *path, mode_t mode) { on_path("open", AT_FDCWD, path); return REAL(creat)(path, mode); }

ssize_t write(int fd, const void *data, size_t size) { on_descriptor("write", fd, (long)size); return REAL(write)(fd, data, size); }
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) { on_descriptor("write", fd, (long)size); return REAL(pwrite)(fd, data, size, at); }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) { on_descriptor("write", fd, (long)size); return REAL(pwrite64)(fd, data, size, at); }

static long total(const struct iovec *parts, int count) {
    long sum = 0;
    for (int i = 0; i < count; i++) sum += (long)parts[i].iov_len;
    return sum;
}
ssize_t writev(int fd, const struct iovec *parts, int count) { on_descriptor("write", fd, total(parts, count)); return REAL(writev)(fd, parts, count); }

ssize_t sendfile(int out, int in, off_t *at, size_t size);
ssize_t sendfile(int out, int in, off_t *at, size_t size) { on_descriptor("copy", out, 0); return REAL(sendfile)(out, in, at, size); }
ssize_t sendfile64(int out, int in, off64_t *at, size_t size);
ssize_t sendfile64(int out, int in, off64_t *at, size_t size) { on_descriptor("copy", out, 0); return REAL(sendfile64)(out, in, at, size); }
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags) {
    on_descriptor("copy", out, 0);
    return REAL(copy_file_range)(in, from, out, to, size, flags);
}

int ftruncate(int fd, off_t size) { on_descriptor("truncate", fd, 0); return REAL(ftruncate)(fd, size); }
int ftruncate64(int fd, off64_t size) { on_descriptor("truncate", fd, 0); return REAL(ftruncate64)(fd, size); }
int fsync(int fd) { on_descriptor("fsync", fd, 0); return REAL(fsync)(fd); }
int fdatasync(int fd) { on_descriptor("fsync", fd, 0); return REAL(fdatasync)(fd); }

int rename(const char *from, const char *to) { on_path("rename", AT_FDCWD, from); return REAL(rename)(from, to); }
int renameat(int from_folder, const char *from, int to_folder, const char *to) {
    on_path("rename", from_folder, from);
    return REAL(renameat)(from_folder, from, to_folder, to);
}
int renameat2(int from_folder, const char *from, int to_folder, const char *to, unsigned flags) {
    on_path("rename", from_folder, from);
    return REAL(renameat2)(from_folder, from, to_folder, to, flags);
}
int mkdir(const char *path, mode_t mode) { on_path("mkdir", AT_FDCWD, path); return REAL(mkdir)(path, mode); }
int mkdirat(int folder, const char *path, mode_t mode) { on_path("mkdir", folder, path); return REAL(mkdirat)(folder, path, mode); }
int link(const char *from, const char *to) { on_path("link", AT_FDCWD, to); return REAL(link)(from, to); }
int linkat(int from_folder, const char *from, int to_folder, const char *to, int flags) {
    on_path("link", to_folder, to);
    return REAL(linkat)(from_folder, from, to_folder, to, flags);
}
int symlink(const char *text, const char *path) { on_path("link", AT_FDCWD, path); return REAL(symlink)(text, path); }
int unlink(const char *path) { on_path("unlink", AT_FDCWD, path); return REAL(unlink)(path); }
int unlinkat(int folder, const char *path, int flags) {
    on_path(flags & AT_REMOVEDIR ? "rmdir" : "unlink", folder, path);
    return REAL(unlinkat)(folder, path, flags);
}
int remove(const char *path) { on_path("unlink", AT_FDCWD, path); return REAL(remove)(path); }
int rmdir(const char *path) { on_path("rmdir", AT_FDCWD, path); return REAL(rmdir)(path); }
