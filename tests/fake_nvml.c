/* NVIDIA's driver library as a test wants it: the functions that pynvml calls, answering as a control file says.
 *
 * FAKE_NVML names the file. It has lines "name value"; the last of a name holds, and "name.1" is for GPU 1 only.
 *   count 2                              GPUs
 *   util.0 80                            what a reading says, in NVML's own units
 *   lost.1 1                             every call for GPU 1 says that it is lost
 *   fail.nvmlDeviceGetPowerUsage.0 3     the function fails with that code
 *   at.nvmlDeviceGetPowerUsage.0 2       ... only in its second call
 *   hang.nvmlDeviceGetTemperature 5000   the function takes so many milliseconds
 *   event 0 8 79                         an event: GPU, type, data (delivered once, in the order of the lines)
 * Each call is a line of FAKE_NVML.calls: the function and the GPU.
 * -DOLD leaves out what drivers before 2023 do not have.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <fcntl.h>

typedef unsigned int uint;
typedef unsigned long long ull;
enum { OK = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, INSUFFICIENT_SIZE = 7, TIMEOUT = 10, GPU_IS_LOST = 15 };
enum { GPUS = 4, NAMES = 64, ALIVE = 0x5e7 };

typedef struct { int index; ull registered; } Gpu;
typedef struct { int magic; } Set;
typedef struct { Gpu *device; ull type, data; uint gpu_instance, compute_instance; } Event;
typedef struct { uint pid; ull used; uint gpu_instance, compute_instance; } Process;

static Gpu gpus[GPUS] = {{0, 0}, {1, 0}, {2, 0}, {3, 0}};
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char counted[NAMES][80];
static int counts[NAMES], delivered;

void fake_reset(void) {
    memset(counted, 0, sizeof counted); memset(counts, 0, sizeof counts); delivered = 0;
    for (int i = 0; i < GPUS; i++) gpus[i].registered = 0;
}

static FILE *control(void) { const char *path = getenv("FAKE_NVML"); return path ? fopen(path, "r") : NULL; }

static long long said(const char *name, int gpu, long long otherwise) {
    char key[80], line[160], with_gpu[96];
    long long value, found = otherwise;
    int special = 0;
    snprintf(with_gpu, sizeof with_gpu, "%s.%d", name, gpu);
    FILE *file = control();
    if (!file) return found;
    while (fgets(line, sizeof line, file))
        if (sscanf(line, "%79s %lld", key, &value) == 2) {
            if (!strcmp(key, with_gpu)) { found = value; special = 1; }
            else if (!special && !strcmp(key, name)) found = value;
        }
    fclose(file);
    return found;
}

static void note(const char *function, int gpu) {
    char path[512], line[120];
    const char *base = getenv("FAKE_NVML");
    if (!base) return;
    snprintf(path, sizeof path, "%s.calls", base);
    int file = open(path, O_WRONLY | O_APPEND | O_CREAT, 0644);
    int n = gpu < 0 ? snprintf(line, sizeof line, "%s\n", function) : snprintf(line, sizeof line, "%s %d\n", function, gpu);
    if (file >= 0) { if (write(file, line, n) < 0) perror("fake_nvml"); close(file); }
}

static void pause_for(long long milliseconds) { struct timespec t = {milliseconds / 1000, milliseconds % 1000 * 1000000}; nanosleep(&t, NULL); }

static int nth_call(const char *function, int gpu) {
    char key[80];
    int i = 0, n = 0;
    snprintf(key, sizeof key, "%s.%d", function, gpu);
    pthread_mutex_lock(&lock);
    while (i < NAMES - 1 && counted[i][0] && strcmp(counted[i], key)) i++;
    strcpy(counted[i], key);
    n = ++counts[i];
    pthread_mutex_unlock(&lock);
    return n;
}

static int begin(const char *function, Gpu *gpu) {
    char key[96];
    int index = gpu ? gpu->index : -1, n = nth_call(function, index);
    note(function, index);
    snprintf(key, sizeof key, "hang.%s", function);
    pause_for(said(key, index, 0));
    if (gpu && said("lost", index, 0)) return GPU_IS_LOST;
    snprintf(key, sizeof key, "fail.%s", function);
    int code = said(key, index, OK);
    snprintf(key, sizeof key, "at.%s", function);
    int at = said(key, index, 0);
    return at && at != n ? OK : code;
}

#define BEGIN(gpu) do { int code = begin(__func__, gpu); if (code) return code; } while (0)
#define READING(function, type, name, otherwise) \
    int function(Gpu *gpu, type *value) { BEGIN(gpu); *value = said(name, gpu->index, otherwise); return OK; }

int nvmlInitWithFlags(uint flags) { (void)flags; BEGIN(NULL); return OK; }
int nvmlShutdown(void) { BEGIN(NULL); return OK; }
const char *nvmlErrorString(int code) { return code == GPU_IS_LOST ? "GPU is lost" : "fake error"; }
int nvmlDeviceGetCount_v2(uint *count) { BEGIN(NULL); *count = said("count", -1, 1); return OK; }
int nvmlDeviceGetHandleByIndex_v2(uint index, Gpu **gpu) {
    if (index >= GPUS) return INVALID_ARGUMENT;
    BEGIN(&gpus[index]);
    *gpu = &gpus[index];
    return OK;
}

int nvmlDeviceGetUtilizationRates(Gpu *gpu, uint *rates) {
    BEGIN(gpu);
    rates[0] = said("util", gpu->index, 50); rates[1] = said("mem_busy", gpu->index, 25);
    return OK;
}
int nvmlDeviceGetMemoryInfo(Gpu *gpu, ull *info) {  /* total, free, used; here what the driver keeps counts as used */
    BEGIN(gpu);
    ull total = said("mem_total", gpu->index, 80LL << 30), used = said("mem_used", gpu->index, 20LL << 30) + (1LL << 30);
    info[0] = total; info[1] = total - used; info[2] = used;
    return OK;
}
#ifndef OLD
struct memory_v2 { uint version; ull total, reserved, free, used; };
int nvmlDeviceGetMemoryInfo_v2(Gpu *gpu, struct memory_v2 *info) {
    BEGIN(gpu);
    if (info->version != 0x02000028) return INVALID_ARGUMENT;
    info->total = said("mem_total", gpu->index, 80LL << 30); info->used = said("mem_used", gpu->index, 20LL << 30);
    info->reserved = 1LL << 30; info->free = info->total - info->used - info->reserved;
    return OK;
}
READING(nvmlDeviceGetCurrentClocksEventReasons, ull, "reasons", 0)
#endif
READING(nvmlDeviceGetCurrentClocksThrottleReasons, ull, "reasons", 0)
READING(nvmlDeviceGetPowerUsage, uint, "power", 300000)
READING(nvmlDeviceGetEnforcedPowerLimit, uint, "power_limit", 700000)
READING(nvmlDeviceGetTotalEnergyConsumption, ull, "energy", 5000)
READING(nvmlDeviceGetPerformanceState, int, "pstate", 0)
READING(nvmlDeviceGetSupportedEventTypes, ull, "supported", 0x1f)
int nvmlDeviceGetTemperature(Gpu *gpu, int sensor, uint *value) {
    BEGIN(gpu);
    if (sensor != 0) return INVALID_ARGUMENT;
    *value = said("temperature", gpu->index, 61);
    return OK;
}
int nvmlDeviceGetClockInfo(Gpu *gpu, int kind, uint *value) {
    BEGIN(gpu);
    *value = kind == 1 ? said("clock_sm", gpu->index, 1980) : kind == 2 ? said("clock_mem", gpu->index, 2619) : 0;
    return OK;
}
int nvmlDeviceGetTotalEccErrors(Gpu *gpu, int kind, int counter, ull *value) {
    BEGIN(gpu);
    if (counter != 0) return INVALID_ARGUMENT;
    *value = said(kind == 0 ? "corrected" : "uncorrected", gpu->index, 0);
    return OK;
}
int nvmlDeviceGetComputeRunningProcesses_v3(Gpu *gpu, uint *count, Process *list) {
    BEGIN(gpu);
    long long pid = said("pid", gpu->index, 0);
    if (!pid) { *count = 0; return OK; }
    if (*count < 1 || !list) { *count = 1; return INSUFFICIENT_SIZE; }
    list[0] = (Process){pid, said("pid_used", gpu->index, 3LL << 30), 0xffffffff, 0xffffffff};
    *count = 1;
    return OK;
}

int nvmlEventSetCreate(Set **set) { BEGIN(NULL); *set = malloc(sizeof(Set)); (*set)->magic = ALIVE; return OK; }
int nvmlEventSetFree(Set *set) {
    BEGIN(NULL);
    if (set->magic != ALIVE) return INVALID_ARGUMENT;
    set->magic = 0;
    for (int i = 0; i < GPUS; i++) gpus[i].registered = 0;  /* there is one set at a time */
    return OK;
}
int nvmlDeviceRegisterEvents(Gpu *gpu, ull types, Set *set) {
    BEGIN(gpu);
    if (set->magic != ALIVE || types & ~said("supported", gpu->index, 0x1f)) return INVALID_ARGUMENT;
    gpu->registered = types;
    return OK;
}

static int next_event(Event *event) {
    char line[160];
    int gpu, n = 0, found = 0;
    ull type, data;
    FILE *file = control();
    if (!file) return 0;
    pthread_mutex_lock(&lock);
    while (!found && fgets(line, sizeof line, file))
        if (sscanf(line, "event %d %llu %llu\n", &gpu, &type, &data) == 3 && strchr(line, '\n') && n++ == delivered) {
            delivered++;
            if (gpus[gpu].registered & type) { *event = (Event){&gpus[gpu], type, data, 0xffffffff, 0xffffffff}; found = 1; }
        }
    pthread_mutex_unlock(&lock);
    fclose(file);
    return found;
}

int nvmlEventSetWait_v2(Set *set, Event *event, uint milliseconds) {
    BEGIN(NULL);
    for (int waited = 0;; waited += 10) {
        if (set->magic != ALIVE) return INVALID_ARGUMENT;
        for (int i = 0; i < GPUS; i++)
            if (gpus[i].registered && said("lost", i, 0)) return GPU_IS_LOST;
        if (next_event(event)) return OK;
        if (waited >= (int)milliseconds) return TIMEOUT;
        pause_for(10);
    }
}
