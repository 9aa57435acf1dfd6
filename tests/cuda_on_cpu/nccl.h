/* Enough of NCCL for ranks that are threads of one process: sums in order of rank, which all see alike. */
#ifndef CUDA_ON_CPU_NCCL_H
#define CUDA_ON_CPU_NCCL_H
#include "cuda_runtime.h"
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>

#define QWEN3_CUDA_RANK_SECONDS 1

enum ncclResult_t { ncclSuccess = 0, ncclUnhandledCudaError = 1, ncclRemoteError = 6, ncclInProgress = 7 };
enum ncclDataType_t { ncclChar = 0, ncclInt = 2, ncclFloat = 7 };
enum ncclRedOp_t { ncclSum = 0, ncclMax = 2 };
struct ncclUniqueId { char internal[128]; };

namespace emulated {
struct clique {                         /* the communicators that meet */
    int n, arrived, left;
    long turn;
    bool broken;
    std::vector<std::vector<char> > copies;         /* what each hands in */
    std::mutex lock;
    std::condition_variable all;
    explicit clique(int ranks) : n(ranks), arrived(0), left(0), turn(0), broken(false) {}
    /* All ranks have come here, or one has given up. If one is gone the device is stuck from here on, the host is not. */
    bool meet(std::unique_lock<std::mutex> &held) {
        const long mine = turn;
        if (++arrived == n) { arrived = 0; turn++; all.notify_all(); }
        while (turn == mine && !broken && emulated_gone < 0) all.wait_for(held, std::chrono::milliseconds(10));
        if (turn == mine && !broken) emulated_stuck[emulated_device] = true;
        return turn != mine && !broken;
    }
};
} /* namespace emulated */

struct emulated_communicator { std::shared_ptr<emulated::clique> clique; int rank; long splits; int device; };
typedef emulated_communicator *ncclComm_t;
struct emulated_splits { int n; std::shared_ptr<emulated::clique> made; };

static inline const char *ncclGetErrorString(ncclResult_t) { return "an error"; }
static inline ncclResult_t emulated_communicate() {
    return emulated_call() == cudaSuccess ? ncclSuccess : ncclUnhandledCudaError;
}
static inline ncclComm_t emulated_join(const std::shared_ptr<emulated::clique> &clique, int rank) {
    emulated_live++;
    return new emulated_communicator{clique, rank, 0, emulated_device};
}
static inline ncclResult_t ncclCommInitAll(ncclComm_t *comms, int n, const int *) {
    if (emulated_communicate() != ncclSuccess) return ncclUnhandledCudaError;
    const auto clique = std::make_shared<emulated::clique>(n);
    for (int i = 0; i < n; i++) comms[i] = emulated_join(clique, i);
    return ncclSuccess;
}
/* Ranks of a process that says it is one of several meet by the first bytes of the id. */
static inline ncclResult_t ncclCommInitRank(ncclComm_t *comm, int n, ncclUniqueId id, int rank) {
    static std::mutex lock;
    static std::shared_ptr<emulated::clique> cliques[256];
    if (emulated_communicate() != ncclSuccess) return ncclUnhandledCudaError;
    std::unique_lock<std::mutex> held(lock);
    auto &clique = cliques[(unsigned char)id.internal[0]];
    if (!clique) clique = std::make_shared<emulated::clique>(n);
    *comm = emulated_join(clique, rank);
    if (++clique->left == n) clique.reset();
    return ncclSuccess;
}
/* The n-th split of each rank gives communicators that belong together. */
static inline ncclResult_t ncclCommSplit(ncclComm_t comm, int, int rank, ncclComm_t *out, void *) {
    static std::mutex lock;
    static std::vector<std::pair<std::pair<emulated::clique *, long>, emulated_splits> > open;
    *out = NULL;
    if (emulated_communicate() != ncclSuccess) return ncclUnhandledCudaError;
    std::unique_lock<std::mutex> held(lock);
    const std::pair<emulated::clique *, long> key(comm->clique.get(), comm->splits++);
    size_t i = 0;
    while (i < open.size() && open[i].first != key) i++;
    if (i == open.size()) open.push_back({key, {0, std::make_shared<emulated::clique>(comm->clique->n)}});
    *out = emulated_join(open[i].second.made, rank);
    if (++open[i].second.n == comm->clique->n) open.erase(open.begin() + (long)i);
    return ncclSuccess;
}
static inline ncclResult_t ncclCommDestroy(ncclComm_t c) { emulated_live--; delete c; return ncclSuccess; }
static inline ncclResult_t ncclCommAbort(ncclComm_t c) {
    {
        std::unique_lock<std::mutex> held(c->clique->lock);
        c->clique->broken = true;
        emulated_stuck[c->device] = false;
        c->clique->all.notify_all();
    }
    return ncclCommDestroy(c);
}
static inline ncclResult_t ncclCommGetAsyncError(ncclComm_t c, ncclResult_t *state) {
    std::unique_lock<std::mutex> held(c->clique->lock);
    *state = c->clique->broken ? ncclRemoteError : ncclSuccess;
    return ncclSuccess;
}
static inline ncclResult_t ncclGroupStart() { return ncclSuccess; }
static inline ncclResult_t ncclGroupEnd() { return ncclSuccess; }

template <class T> void emulated_reduce(void *to, const std::vector<std::vector<char> > &all, size_t n, bool add) {
    for (size_t i = 0; i < n; i++) {
        T sum = ((const T *)(const void *)all[0].data())[i];
        for (size_t r = 1; r < all.size(); r++) {
            const T v = ((const T *)(const void *)all[r].data())[i];
            sum = add ? sum + v : sum > v ? sum : v;
        }
        memcpy((T *)to + i, &sum, sizeof sum);
    }
}
static inline ncclResult_t ncclAllReduce(const void *from, void *to, size_t n, ncclDataType_t type, ncclRedOp_t op,
                                         ncclComm_t comm, cudaStream_t s) {
    const auto clique = comm->clique;
    const int rank = comm->rank;
    const cudaError_t e = emulated_enqueue(s, [=] {
        std::unique_lock<std::mutex> held(clique->lock);
        clique->copies.resize((size_t)clique->n);
        clique->copies[(size_t)rank].assign((const char *)from, (const char *)from + 4 * n);
        if (!clique->meet(held)) return;
        if (type == ncclInt) emulated_reduce<int>(to, clique->copies, n, op == ncclSum);
        else emulated_reduce<float>(to, clique->copies, n, op == ncclSum);
        clique->meet(held);
    });
    return e == cudaSuccess ? ncclSuccess : ncclUnhandledCudaError;
}
static inline ncclResult_t ncclAllGather(const void *from, void *to, size_t n, ncclDataType_t type, ncclComm_t comm,
                                         cudaStream_t s) {
    const size_t bytes = type == ncclChar ? n : 4 * n;
    const auto clique = comm->clique;
    const int rank = comm->rank;
    const cudaError_t e = emulated_enqueue(s, [=] {
        std::unique_lock<std::mutex> held(clique->lock);
        clique->copies.resize((size_t)clique->n);
        clique->copies[(size_t)rank].assign((const char *)from, (const char *)from + bytes);
        if (!clique->meet(held)) return;
        for (size_t i = 0; i < clique->copies.size(); i++) memcpy((char *)to + i * bytes, clique->copies[i].data(), bytes);
        clique->meet(held);
    });
    return e == cudaSuccess ? ncclSuccess : ncclUnhandledCudaError;
}
#endif
