/* A file system that fails on command, for tests: preloaded, it numbers every operation below one folder that changes
 * files, writes each down, and lets the n-th fail, fall short, or be the process's last.
 *
 * cc -shared -fPIC -O1 faultio.c -o faultio.so; LD_PRELOAD=faultio.so; then, from the process itself:
 * faultio_start(folder, log file or "", n or 0, error number or SHORT or KILL) and faultio_stop() -> operations seen.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { SHORT = 1000, KILL = 1001, FILES = 4096 };

static char root[PATH_MAX];
static size_t root_length;
static int log_file = -1, active;
static long seen, fail_at, fired;
static int fault;
static char *names[FILES]; /* of open descriptors below the folder */

#define REAL(type, name, ...)                                                                                          \
    static type (*real)(__VA_ARGS__);                                                                                  \
    if (!real) *(void **)&real = dlsym(RTLD_NEXT, name)

static ssize_t real_write(int fd, const void *data, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t);
    return real(fd, data, size);
}

static void put(const void *data, size_t size) {
    for (const char *at = data; size;) {
        ssize_t done = real_write(log_file, at, size);
        if (done <= 0) abort();
        at += done, size -= (size_t)done;
    }
}

static void put_text(const char *text) {
    uint32_t length = (uint32_t)strlen(text);
    put(&length, sizeof length), put(text, length);
}

/* The path below the folder, or NULL; `out` has PATH_MAX bytes. */
static const char *below(int folder, const char *path, char *out) {
    if (!active || !path) return NULL;
    if (path[0] == '/') {
        snprintf(out, PATH_MAX, "%s", path);
    } else if (folder == AT_FDCWD) {
        char here[PATH_MAX];
        if (!getcwd(here, sizeof here) || snprintf(out, PATH_MAX, "%s/%s", here, path) >= PATH_MAX) return NULL;
    } else if (folder >= 0 && folder < FILES && names[folder]) {
        snprintf(out, PATH_MAX, "%s/%s", names[folder], path);
    } else {
        return NULL;
    }
    return strncmp(out, root, root_length) == 0 && (out[root_length] == '/' || !out[root_length]) ? out : NULL;
}

/* Counts an operation. 0: go on; 1: it fails, errno is set; 2: half of a write. */
static int meets_fault(int is_write) {
    if (++seen != fail_at) return 0;
    fired = 1;
    if (fault == KILL) raise(SIGKILL);
    if (fault == SHORT) return is_write ? 2 : 0;
    errno = fault;
    return 1;
}

static void note(char kind, const char *path, const char *other, int64_t offset, const void *data, size_t size) {
    if (log_file < 0) return;
    int kept = errno;
    uint64_t bytes = size;
    put(&kind, 1), put_text(path), put_text(other ? other : ""), put(&offset, 8), put(&bytes, 8), put(data, size);
    errno = kept;
}

static int opened(int folder, const char *path, int flags, mode_t mode, const char *symbol) {
    REAL(int, "openat64", int, const char *, int, ...);
    (void)symbol;
    char whole[PATH_MAX];
    const char *name = below(folder, path, whole);
    int makes = name && (flags & O_CREAT) && access(name, F_OK) != 0, cuts = name && !makes && (flags & O_TRUNC);
    if ((makes || cuts) && meets_fault(0)) return -1;
    int fd = real(folder, path, flags, mode);
    if (fd >= 0 && fd < FILES) {
        free(names[fd]), names[fd] = name ? strdup(name) : NULL;
        if (makes) note('c', name, NULL, 0, NULL, 0);
        if (cuts) note('t', name, NULL, 0, NULL, 0);
    }
    return fd;
}

#define MODE                                                                                                           \
    mode_t mode = 0;                                                                                                   \
    if (flags & (O_CREAT | O_TMPFILE)) {                                                                               \
        va_list more;                                                                                                  \
        va_start(more, flags), mode = va_arg(more, mode_t), va_end(more);                                              \
    }
int open(const char *path, int flags, ...) { MODE return opened(AT_FDCWD, path, flags, mode, "open"); }
int open64(const char *path, int flags, ...) { MODE return opened(AT_FDCWD, path, flags, mode, "open64"); }
int openat(int folder, const char *path, int flags, ...) { MODE return opened(folder, path, flags, mode, "openat"); }
int openat64(int folder, const char *path, int flags, ...) { MODE return opened(folder, path, flags, mode, "openat"); }

int close(int fd) {
    REAL(int, "close", int);
    if (fd >= 0 && fd < FILES) free(names[fd]), names[fd] = NULL;
    return real(fd);
}

static const char *name_of(int fd) { return active && fd >= 0 && fd < FILES ? names[fd] : NULL; }

static int64_t position(int fd) {
    struct stat about;
    if ((fcntl(fd, F_GETFL) & O_APPEND) && fstat(fd, &about) == 0) return about.st_size;
    return lseek(fd, 0, SEEK_CUR);
}

ssize_t write(int fd, const void *data, size_t size) {
    const char *name = name_of(fd);
    if (!name) return real_write(fd, data, size);
    int64_t at = position(fd);
    int met = meets_fault(1);
    if (met == 1) return -1;
    ssize_t done = real_write(fd, data, met && size > 1 ? size / 2 : size);
    if (done > 0) note('w', name, NULL, at, data, (size_t)done);
    return done;
}

ssize_t writev(int fd, const struct iovec *parts, int count) { /* piece by piece: callers go on after a short write */
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    if (!name_of(fd)) return real(fd, parts, count);
    for (int i = 0; i < count; ++i)
        if (parts[i].iov_len) return write(fd, parts[i].iov_base, parts[i].iov_len);
    return 0;
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    REAL(ssize_t, "pwrite64", int, const void *, size_t, off64_t);
    const char *name = name_of(fd);
    if (!name) return real(fd, data, size, at);
    int met = meets_fault(1);
    if (met == 1) return -1;
    ssize_t done = real(fd, data, met && size > 1 ? size / 2 : size, at);
    if (done > 0) note('w', name, NULL, at, data, (size_t)done);
    return done;
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) { return pwrite64(fd, data, size, at); }

int fsync(int fd) {
    REAL(int, "fsync", int);
    const char *name = name_of(fd);
    if (name && meets_fault(0)) return -1;
    if (name) note('s', name, NULL, 0, NULL, 0);
    return name ? 0 : real(fd); /* written down, not waited for */
}
int fdatasync(int fd) { return fsync(fd); }

int ftruncate64(int fd, off64_t size) {
    REAL(int, "ftruncate64", int, off64_t);
    const char *name = name_of(fd);
    if (name && meets_fault(0)) return -1;
    int result = real(fd, size);
    if (name && result == 0) note('t', name, NULL, size, NULL, 0);
    return result;
}
int ftruncate(int fd, off_t size) { return ftruncate64(fd, size); }

ssize_t sendfile64(int to, int from, off64_t *offset, size_t size) { /* copies come as reads and writes */
    REAL(ssize_t, "sendfile64", int, int, off64_t *, size_t);
    if (name_of(to)) return errno = ENOTSOCK, -1;
    return real(to, from, offset, size);
}
ssize_t sendfile(int to, int from, off_t *offset, size_t size) { return sendfile64(to, from, offset, size); }

ssize_t copy_file_range(int from, off64_t *at, int to, off64_t *where, size_t size, unsigned flags) {
    REAL(ssize_t, "copy_file_range", int, off64_t *, int, off64_t *, size_t, unsigned);
    if (name_of(to)) return errno = EXDEV, -1;
    return real(from, at, to, where, size, flags);
}

int renameat(int from_folder, const char *from, int to_folder, const char *to) {
    REAL(int, "renameat", int, const char *, int, const char *);
    char one[PATH_MAX], two[PATH_MAX];
    const char *name = below(from_folder, from, one), *other = below(to_folder, to, two);
    if (name && other && meets_fault(0)) return -1;
    int result = real(from_folder, from, to_folder, to);
    if (name && other && result == 0) note('r', name, other, 0, NULL, 0);
    return result;
}
int rename(const char *from, const char *to) { return renameat(AT_FDCWD, from, AT_FDCWD, to); }

int unlinkat(int folder, const char *path, int flags) {
    REAL(int, "unlinkat", int, const char *, int);
    char whole[PATH_MAX];
    const char *name = below(folder, path, whole);
    struct stat about;
    int there = name && fstatat(folder, path, &about, AT_SYMLINK_NOFOLLOW) == 0;
    if (there && meets_fault(0)) return -1;
    int result = real(folder, path, flags);
    if (there && result == 0) note('u', name, NULL, 0, NULL, 0);
    return result;
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int mkdirat(int folder, const char *path, mode_t mode) {
    REAL(int, "mkdirat", int, const char *, mode_t);
    char whole[PATH_MAX];
    const char *name = below(folder, path, whole);
    if (name && access(name, F_OK) != 0 && meets_fault(0)) return -1;
    int result = real(folder, path, mode);
    if (name && result == 0) note('d', name, NULL, 0, NULL, 0);
    return result;
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

void faultio_start(const char *folder, const char *log, long at, int what) {
    active = 0;
    for (int fd = 0; fd < FILES; ++fd) free(names[fd]), names[fd] = NULL;
    root_length = (size_t)snprintf(root, sizeof root, "%s", folder);
    log_file = *log ? open(log, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600) : -1;
    seen = fired = 0, fail_at = at, fault = what, active = 1;
}

long faultio_stop(void) {
    active = 0;
    if (log_file >= 0) close(log_file), log_file = -1;
    return seen;
}

long faultio_fired(void) { return fired; }
