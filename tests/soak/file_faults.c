/* Counts the file operations under one folder, and lets one of them fail, or ends the process there.

   Loaded with LD_PRELOAD, so that it sees the calls of Python, of Rust and of C++ alike. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OPEN, READ, WRITE, SYNC, RENAME, MKDIR, REMOVE, STAT, LIST, CHMOD };
enum { COUNT, FAIL, FULL, KILL, KILL_AFTER, KILL_HALF };
enum { MAX_FILES = 4096, MAX_NOTED = 65536 };

/* Shared by the process that plans and those that it forks; file_faults.py has the same fields. */
struct Plan {
  long action, at;                 /* the operation that it happens at, from 1 on */
  _Atomic long count;              /* operations so far */
  _Atomic long happened;           /* faults so far */
  unsigned char kinds[MAX_NOTED];  /* of each operation */
};

static struct Plan* plan;
static char folder[4096];
static size_t folder_length;
static _Atomic char watched[MAX_FILES];

void soak_watch(struct Plan* shared, const char* path) {
  strncpy(folder, path, sizeof folder - 1);
  folder_length = strlen(folder);
  memset((void*)watched, 0, sizeof watched);
  plan = shared;
}

static int of_path(const char* path) {
  return plan && path && folder_length && strncmp(path, folder, folder_length) == 0;
}

static int of_file(int file) { return plan && file >= 0 && file < MAX_FILES && watched[file]; }

static int of_entry(int file, const char* path) {
  return of_path(path) || (path && path[0] != '/' && of_file(file));
}

static void end_process(void) { kill(getpid(), SIGKILL); for (;;) pause(); }

/* What becomes of an operation. */
enum { GO_ON, END_AFTER, HALF, REFUSED };

static int decide(int kind, int writes) {
  long number = atomic_fetch_add(&plan->count, 1) + 1;
  if (number <= MAX_NOTED) plan->kinds[number - 1] = kind;
  if (plan->action == FULL && number >= plan->at && writes) {
    atomic_fetch_add(&plan->happened, 1);
    errno = ENOSPC;
    return REFUSED;
  }
  if (number != plan->at || plan->action == COUNT || plan->action == FULL) return GO_ON;
  atomic_fetch_add(&plan->happened, 1);
  switch (plan->action) {
    case KILL: end_process();
    case KILL_AFTER: return END_AFTER;
    case KILL_HALF: if (kind == WRITE) return HALF; end_process();
  }
  errno = EIO;
  return REFUSED;
}

#define REAL(name) \
  static __typeof__(name)* real; \
  if (!real) real = (__typeof__(name)*)dlsym(RTLD_NEXT, #name)

/* Calls the real function with the arguments, if the operation is not to fail. */
#define PASS(type, of_folder, kind, writes, call) \
  if (!(of_folder)) return call; \
  int what = decide(kind, writes); \
  if (what == REFUSED) return (type)-1; \
  type result = call; \
  if (what != GO_ON) end_process(); \
  return result

static int opened(int file, int of_folder) {
  if (plan && file >= 0 && file < MAX_FILES) watched[file] = of_folder;
  return file;
}

#define OPENS(path_is_watched, call) \
  mode_t mode = 0; \
  if (flags & (O_CREAT | __O_TMPFILE)) { \
    va_list more; \
    va_start(more, flags); \
    mode = va_arg(more, mode_t); \
    va_end(more); \
  } \
  int of_folder = path_is_watched; \
  if (!of_folder) return opened(call, 0); \
  int what = decide(OPEN, flags & O_CREAT); \
  if (what == REFUSED) return -1; \
  int file = opened(call, 1); \
  if (what == END_AFTER) end_process(); \
  return file

int open(const char* path, int flags, ...) { REAL(open); OPENS(of_path(path), real(path, flags, mode)); }
int open64(const char* path, int flags, ...) { REAL(open64); OPENS(of_path(path), real(path, flags, mode)); }
int openat(int at, const char* path, int flags, ...) { REAL(openat); OPENS(of_entry(at, path), real(at, path, flags, mode)); }
int openat64(int at, const char* path, int flags, ...) { REAL(openat64); OPENS(of_entry(at, path), real(at, path, flags, mode)); }

int close(int file) { REAL(close); if (plan && file >= 0 && file < MAX_FILES) watched[file] = 0; return real(file); }

ssize_t read(int file, void* to, size_t size) { REAL(read); PASS(ssize_t, of_file(file), READ, 0, real(file, to, size)); }

ssize_t write(int file, const void* from, size_t size) {
  REAL(write);
  if (!of_file(file)) return real(file, from, size);
  int what = decide(WRITE, 1);
  if (what == REFUSED) return -1;
  ssize_t result = real(file, from, what == HALF ? size / 2 : size);
  if (what != GO_ON) end_process();
  return result;
}

ssize_t writev(int file, const struct iovec* parts, int count) { REAL(writev); PASS(ssize_t, of_file(file), WRITE, 1, real(file, parts, count)); }
ssize_t sendfile(int to, int from, off_t* offset, size_t size) { REAL(sendfile); PASS(ssize_t, of_file(to), WRITE, 1, real(to, from, offset, size)); }
ssize_t sendfile64(int to, int from, off64_t* offset, size_t size) { REAL(sendfile64); PASS(ssize_t, of_file(to), WRITE, 1, real(to, from, offset, size)); }
int fsync(int file) { REAL(fsync); PASS(int, of_file(file), SYNC, 1, real(file)); }
int fdatasync(int file) { REAL(fdatasync); PASS(int, of_file(file), SYNC, 1, real(file)); }
int ftruncate64(int file, off64_t size) { REAL(ftruncate64); PASS(int, of_file(file), WRITE, 0, real(file, size)); }
int rename(const char* from, const char* to) { REAL(rename); PASS(int, of_path(from) || of_path(to), RENAME, 1, real(from, to)); }
int renameat(int a, const char* from, int b, const char* to) { REAL(renameat); PASS(int, of_entry(a, from) || of_entry(b, to), RENAME, 1, real(a, from, b, to)); }
int renameat2(int a, const char* from, int b, const char* to, unsigned how) { REAL(renameat2); PASS(int, of_entry(a, from) || of_entry(b, to), RENAME, 1, real(a, from, b, to, how)); }
int mkdir(const char* path, mode_t mode) { REAL(mkdir); PASS(int, of_path(path), MKDIR, 1, real(path, mode)); }
int mkdirat(int at, const char* path, mode_t mode) { REAL(mkdirat); PASS(int, of_entry(at, path), MKDIR, 1, real(at, path, mode)); }
int unlink(const char* path) { REAL(unlink); PASS(int, of_path(path), REMOVE, 0, real(path)); }
int unlinkat(int at, const char* path, int flags) { REAL(unlinkat); PASS(int, of_entry(at, path), REMOVE, 0, real(at, path, flags)); }
int rmdir(const char* path) { REAL(rmdir); PASS(int, of_path(path), REMOVE, 0, real(path)); }
int stat64(const char* path, struct stat64* to) { REAL(stat64); PASS(int, of_path(path), STAT, 0, real(path, to)); }
int lstat64(const char* path, struct stat64* to) { REAL(lstat64); PASS(int, of_path(path), STAT, 0, real(path, to)); }
int fstat64(int file, struct stat64* to) { REAL(fstat64); PASS(int, of_file(file), STAT, 0, real(file, to)); }
int fstatat64(int at, const char* path, struct stat64* to, int flags) { REAL(fstatat64); PASS(int, of_entry(at, path), STAT, 0, real(at, path, to, flags)); }
int chmod(const char* path, mode_t mode) { REAL(chmod); PASS(int, of_path(path), CHMOD, 0, real(path, mode)); }
DIR* opendir(const char* path) {
  REAL(opendir);
  if (!of_path(path)) return real(path);
  int what = decide(LIST, 0);
  if (what == REFUSED) return 0;
  DIR* found = real(path);
  if (what == END_AFTER) end_process();
  return found;
}
