// A CUDA runtime without a GPU, as far as megarubric/exchange/cuda_memory.py calls it: device memory is an anonymous file
// of the process that allocates it, a handle says which, and opening one maps it. Where CUDA's header is found, the
// definitions below are compiled against its declarations.
//
//   STANDIN_DEVICES   physical devices that this process sees, in its order, like "5,2" (default "0")
//   STANDIN_BYTES     memory of a device in bytes (default 1 GiB)
#define _GNU_SOURCE
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <fcntl.h>
#include <unistd.h>

#if defined(MEGARUBRIC_CUDA_HEADER)
#include <cuda_runtime_api.h>
_Static_assert(offsetof(struct cudaDeviceProp, uuid) == 256 && sizeof(cudaUUID_t) == 16, "where the UUID lies");
_Static_assert(sizeof(struct cudaDeviceProp) <= 4096, "room for the properties");
#else
typedef int cudaError_t;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2, cudaErrorInvalidDevice = 101,
       cudaErrorDeviceUninitialized = 201, cudaErrorMapBufferObjectFailed = 205, cudaErrorInvalidResourceHandle = 400 };
typedef struct { char reserved[64]; } cudaIpcMemHandle_t;
struct cudaDeviceProp { char name[256]; char uuid[16]; };
#endif
_Static_assert(sizeof(cudaIpcMemHandle_t) == 64, "size of a handle");

struct memory {  // also what a handle holds
  int32_t zero;  // a handle may begin with zeros
  int32_t pid, fd, physical;
  uint64_t bytes;
};
static struct block { struct memory what; void *at; int opened; } blocks[64];
static int current, last;

static cudaError_t fail(int code) { return (cudaError_t)(last = code); }

static int physical(int ordinal) {  // -1: there is no such device
  const char *seen = getenv("STANDIN_DEVICES");
  if (seen == NULL) seen = "0";
  for (; *seen; seen += strcspn(seen, ","), seen += *seen == ',')
    if (ordinal-- == 0) return atoi(seen);
  return -1;
}

static struct block *find(const void *at) {
  for (int i = 0; i < 64; i++)
    if (blocks[i].at == at) return &blocks[i];  // at NULL: one that is not in use
  return NULL;
}

cudaError_t cudaGetDevice(int *device) { return *device = current, cudaSuccess; }

cudaError_t cudaSetDevice(int device) {
  if (physical(device) < 0) return fail(cudaErrorInvalidDevice);
  return current = device, cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
  if (physical(device) < 0) return fail(cudaErrorInvalidDevice);
  memset(properties, 0xee, sizeof *properties);
  strcpy(properties->name, "stand-in");
  memset(&properties->uuid, 0, 16);
  ((char *)&properties->uuid)[15] = (char)physical(device);
  return cudaSuccess;
}

cudaError_t cudaMalloc(void **pointer, size_t bytes) {
  const char *limit = getenv("STANDIN_BYTES");
  uint64_t used = bytes;
  for (int i = 0; i < 64; i++)
    if (blocks[i].at && !blocks[i].opened && blocks[i].what.physical == physical(current)) used += blocks[i].what.bytes;
  struct block *block = find(NULL);
  if (block == NULL || used > (limit ? strtoull(limit, NULL, 10) : 1ull << 30)) return fail(cudaErrorMemoryAllocation);
  int fd = memfd_create("standin-device", MFD_CLOEXEC);
  if (fd < 0 || ftruncate(fd, bytes) != 0) return fail(cudaErrorMemoryAllocation);
  void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (at == MAP_FAILED) return fail(cudaErrorMemoryAllocation);
  memset(at, 0xa5, bytes);  // fresh memory holds anything
  *block = (struct block){{0, getpid(), fd, physical(current), bytes}, at, 0};
  return *pointer = at, cudaSuccess;
}

cudaError_t cudaFree(void *pointer) {
  struct block *block = pointer ? find(pointer) : NULL;
  if (block == NULL || block->opened) return fail(cudaErrorInvalidValue);
  munmap(pointer, block->what.bytes);
  close(block->what.fd);
  return block->at = NULL, cudaSuccess;
}

cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t *handle, void *pointer) {
  struct block *block = pointer ? find(pointer) : NULL;
  if (block == NULL || block->opened) return fail(cudaErrorInvalidValue);
  memset(handle, 0, sizeof *handle);
  memcpy(handle, &block->what, sizeof block->what);
  handle->reserved[63] = 0x5c;  // all 64 bytes have to arrive
  return cudaSuccess;
}

cudaError_t cudaIpcOpenMemHandle(void **pointer, cudaIpcMemHandle_t handle, unsigned int flags) {
  struct memory what;
  memcpy(&what, &handle, sizeof what);
  if (flags != 1 || handle.reserved[63] != 0x5c) return fail(cudaErrorInvalidValue);
  if (what.pid == getpid()) return fail(cudaErrorDeviceUninitialized);  // CUDA's answer to one's own handle
  if (what.physical != physical(current)) return fail(cudaErrorInvalidResourceHandle);  // no peers here
  char path[64];
  snprintf(path, sizeof path, "/proc/%d/fd/%d", what.pid, what.fd);
  struct block *block = find(NULL);
  int fd = block ? open(path, O_RDWR | O_CLOEXEC) : -1;
  if (fd < 0) return fail(cudaErrorMapBufferObjectFailed);
  void *at = mmap(NULL, what.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  if (at == MAP_FAILED) return fail(cudaErrorMapBufferObjectFailed);
  *block = (struct block){what, at, 1};
  return *pointer = at, cudaSuccess;
}

cudaError_t cudaIpcCloseMemHandle(void *pointer) {
  struct block *block = pointer ? find(pointer) : NULL;
  if (block == NULL || !block->opened) return fail(cudaErrorInvalidValue);
  munmap(pointer, block->what.bytes);
  return block->at = NULL, cudaSuccess;
}

cudaError_t cudaGetLastError(void) {
  int code = last;
  return last = 0, (cudaError_t)code;
}

const char *cudaGetErrorString(cudaError_t code) {
  switch ((int)code) {
    case 0: return "no error";
    case 1: return "invalid argument";
    case 2: return "out of memory";
    case 101: return "invalid device ordinal";
    case 201: return "invalid device context";
    case 205: return "mapping of buffer object failed";
    case 400: return "invalid resource handle";
  }
  return "unrecognized error code";
}
