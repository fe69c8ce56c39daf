// The CUDA backend: memory, one compute stream, the mailbox of sampled tokens, and captured steps.
// The verbs themselves are the kernels beside this file and cuBLASLt.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <fstream>
#include <limits>
#include <optional>
#include <string>
#include <thread>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "kernels/cuda/check.h"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/mamba1_step.h"
#include "kernels/cuda/mamba2_mixer.h"
#include "kernels/cuda/mamba2_persistent.h"
#include "kernels/cuda/staging.h"
#include "kernels/cuda/verbs.h"
#include "kernels/cuda/weight_stream.h"

namespace krait::cuda {

void check(cudaError_t status, const char* call, const char* file, int line) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();
  throw Error(ErrorKind::device,
              fmt::format("CUDA: {} failed with {} ({}) at {}:{}", call, cudaGetErrorName(status),
                          cudaGetErrorString(status), file, line),
              status == cudaErrorNoKernelImageForDevice
                  ? "this krait was not built for this GPU: see KRAIT_CUDA_ARCHITECTURES"
                  : "");
}

int device_attribute(cudaDeviceAttr attribute) {
  int device = 0;
  int value = 0;
  KRAIT_CUDA(cudaGetDevice(&device));
  KRAIT_CUDA(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

namespace {

/// Up to this many rows the hand-written kernel streams the weights faster than cuBLASLt does.
constexpr int64_t kGemvRows = 4;
/// Up to this many rows the products before a recurrence are ours.
constexpr int64_t kEarlyRows = 128;
/// A product of whose columns some are needed later is divided from so many rows and bytes of
/// weights on. H100, 2.8b (52 MB): steps of 64 sequences 3 to 6% shorter; 130m (4.7 MB): 0.4%
/// longer.
constexpr int64_t kAsideRows = 16;
/// And in steps up to so many rows, where products are bound by their weights: beyond, the later
/// part takes the multiprocessors from the short products that it should run beside. H100, 2.8b, 16
/// layers, bf16: divided, steps of 128 sequences 3.5% longer, of 256 5.5%, of 512 1.7%, of 1024 0
/// to 0.8%; between 64 and 128 not measured.
constexpr int64_t kAsideStep = 96;
/// And of prompts up to so many rows. H100, 2.8b: 16 tokens 1.6% shorter, 64 5%, 128 4%; 256 3% and
/// 512 2% longer.
constexpr int64_t kAsidePrompt = 128;
constexpr size_t kAsideBytes = size_t{16} << 20;
/// From so many bytes of weights on a ring in shared memory pays for any number of rows.
constexpr size_t kRingBytes = size_t{8} << 20;

/// Captured steps that are kept. Each takes 3 KB of device memory and 10 KB of the host's for a
/// kernel: 1.4 and 4.7 MB for the 450 of a prefill of 2.8b.
constexpr size_t kMostSteps = 128;
/// A capture pays when the step comes some times more: H100, prefill of 130m: it takes 2 ms and
/// spares 0.25 to 0.4 ms each time.
constexpr int kRunsToCapture = 5;
/// A step whose products still try algorithms isn't captured, but for so many runs at most.
constexpr int kRunsToChoose = 8;

/// cudaDevAttrMaxPitch of all devices so far.
constexpr size_t kMaxPitch = 0x7fffffff;

void free_device(void* data, size_t) noexcept { cudaFree(data); }
void free_pinned(void* data, size_t) noexcept { cudaFreeHost(data); }

class CudaOps final : public Ops {
 public:
  explicit CudaOps(int index) : index_(index) {
    KRAIT_CUDA(cudaSetDevice(index_));
    KRAIT_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    KRAIT_CUDA(cudaStreamCreateWithFlags(&aside_, cudaStreamNonBlocking));
    KRAIT_CUDA(cudaEventCreateWithFlags(&forked_, cudaEventDisableTiming));
    KRAIT_CUDA(cudaEventCreateWithFlags(&joined_, cudaEventDisableTiming));
    constexpr size_t kWorkspace = size_t{32} << 20;  // what cuBLAS documents for Hopper
    gemm_ = std::make_unique<Gemm>(allocate(kWorkspace, "cuBLASLt workspace"));
    aside_gemm_ = std::make_unique<Gemm>(allocate(kWorkspace, "cuBLASLt workspace"));
    make_mailbox();
  }

  ~CudaOps() override {
    cudaStreamSynchronize(stream_);
    for (auto& [key, step] : steps_) {
      if (step.graph != nullptr) cudaGraphExecDestroy(step.graph);
    }
    cudaEventDestroy(forked_);
    cudaEventDestroy(joined_);
    cudaStreamDestroy(aside_);
    cudaStreamDestroy(stream_);
  }

  std::string_view backend() const override { return "cuda"; }

  DeviceInfo info() const override {
    cudaDeviceProp prop{};
    KRAIT_CUDA(cudaGetDeviceProperties(&prop, index_));
    DeviceInfo info;
    info.name = prop.name;
    info.driver = driver();
    info.clocks = clocks(prop);
    KRAIT_CUDA(cudaMemGetInfo(&info.memory_free, &info.memory_total));
    return info;
  }

  DType activation_dtype(DType weights) const override { return weights; }

  // ---- memory -----------------------------------------------------------------------------------

  Buffer allocate(size_t bytes, std::string_view what) override {
    void* p = nullptr;
    const cudaError_t status = cudaMalloc(&p, std::max<size_t>(bytes, 1));
    if (status == cudaErrorMemoryAllocation) {
      (void)cudaGetLastError();
      size_t free = 0;
      size_t total = 0;
      KRAIT_CUDA(cudaMemGetInfo(&free, &total));
      throw Error(ErrorKind::device,
                  fmt::format("out of GPU memory: {} needs {} bytes, {} of {} are free", what,
                              bytes, free, total),
                  "use a smaller --prefill-chunk, fewer sequences, --dtype bf16, or --device cpu");
    }
    KRAIT_CUDA(status);
    return {p, bytes, free_device};
  }

  void upload(void* dst, const void* src, size_t bytes) override {
    staging_.upload(dst, src, bytes, stream_);
  }
  void download(void* dst, const void* src, size_t bytes) override {
    KRAIT_CUDA(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToHost, stream_));
    synchronize();
  }
  void copy(void* dst, const void* src, size_t bytes) override {
    KRAIT_CUDA(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToDevice, stream_));
  }
  void zero(void* dst, size_t bytes) override {
    KRAIT_CUDA(cudaMemsetAsync(dst, 0, bytes, stream_));
  }
  void copy_rows(void* dst, const void* src, size_t pitch, size_t width, size_t n) override {
    if (pitch > kMaxPitch) return Ops::copy_rows(dst, src, pitch, width, n);
    KRAIT_CUDA(
        cudaMemcpy2DAsync(dst, pitch, src, pitch, width, n, cudaMemcpyDeviceToDevice, stream_));
  }
  void zero_rows(void* dst, size_t pitch, size_t width, size_t n) override {
    if (pitch > kMaxPitch) return Ops::zero_rows(dst, pitch, width, n);
    KRAIT_CUDA(cudaMemset2DAsync(dst, pitch, 0, width, n, stream_));
  }
  void synchronize() override { KRAIT_CUDA(cudaStreamSynchronize(stream_)); }

  void start_core_clock() override { cuda::start_core_clock(stream_); }
  double mean_core_clock() override { return cuda::mean_core_clock(stream_); }

  Tensor import_weight(const Tensor& host, DType dtype) override {
    const size_t bytes = static_cast<size_t>(host.numel()) * itemsize(dtype);
    Tensor t(place(bytes), dtype, host.shape);
    weights_.copy(t.data, dtype, host);
    return t;
  }
  void weights_ready() override { weights_.finish(); }

  // ---- verbs ------------------------------------------------------------------------------------

  void embed(const Tensor& residual, const Tensor& ids, const Tensor& table) override {
    cuda::embed(residual, ids, table, stream_);
  }
  void gather_rows(const Tensor& out, const Tensor& src, const Tensor& index) override {
    cuda::gather_rows(out, src, index, stream_);
  }
  void rms_norm(const Tensor& out, const Tensor& x, const Tensor& weight, float eps) override {
    cuda::rms_norm(out, x, weight, eps, stream_);
  }
  void rms_norm_parts(const Tensor& x, const std::array<int64_t, 3>& widths, float eps) override {
    cuda::rms_norm_parts(x, widths, eps, stream_);
  }
  void linear(const Tensor& out, const Tensor& in, const Tensor& W, const Tensor& bias) override {
    product(out, in, W, bias, false);
  }
  void linear_soon(const Tensor& out, int64_t n_soon, const Tensor& in, const Tensor& W,
                   const Tensor& bias, const Batch& batch) override {
    const int64_t n_later = out.dim(1) - n_soon;
    if (!in_step_ || settling_ || in.dim(0) < kAsideRows || W.bytes() < kAsideBytes ||
        in.dim(0) > (batch.max_len > 1 ? kAsidePrompt : kAsideStep)) {
      return linear(out, in, W, bias);
    }
    const auto part = [&](int64_t begin, int64_t n, bool aside) {
      product(out.columns(begin, n), in, W.rows(begin, n), bias ? bias.rows(begin, n) : bias, false,
              aside);
    };
    part(0, n_soon, false);
    // What follows are short kernels that leave the memory alone for the most part: the rest of the
    // weights is read beside them.
    if (capturing()) {
      KRAIT_CUDA(cudaEventRecord(forked_, stream_));
      KRAIT_CUDA(cudaStreamWaitEvent(aside_, forked_, 0));
    }
    settling_ = true;
    part(n_soon, n_later, true);
  }
  void settle() override {
    if (settling_ && capturing()) {
      KRAIT_CUDA(cudaEventRecord(joined_, aside_));
      KRAIT_CUDA(cudaStreamWaitEvent(stream_, joined_, 0));
    }
    settling_ = false;
  }
  void linear_add(const Tensor& acc, const Tensor& in, const Tensor& W,
                  const Tensor& bias) override {
    product(acc, in, W, bias, true);
  }
  void conv1d_silu(const Tensor& out, const Tensor& u, const Tensor& weight, const Tensor& bias,
                   const Tensor& conv_state, const Batch& batch) override {
    cuda::conv1d_silu(out, u, weight, bias, conv_state, batch, early(conv_state, batch), stream_);
  }
  void selective_scan(const Tensor& y, const ScanInputs& in, const Tensor& ssm_state,
                      const Batch& batch) override {
    if (batch.max_len == 1) {
      cuda::selective_state_update(y, in, ssm_state, batch, early(ssm_state, batch), stream_);
    } else {
      cuda::selective_scan(y, in, ssm_state, batch, stream_);
    }
  }
  void ssd_scan(const Tensor& y, const SsdInputs& in, const Tensor& ssm_state,
                const Batch& batch) override {
    if (batch.max_len == 1) return cuda::ssd_state_update(y, in, ssm_state, batch, stream_);
    if (cuda::ssd_scan_chunks(y, in, ssm_state, batch, ssd_scratch(), stream_)) return;
    cuda::ssd_scan_steps(y, in, ssm_state, batch, stream_);
  }
  void gated_rms_norm(const Tensor& out, const Tensor& y, const Tensor& z, const Tensor& weight,
                      int64_t n_group, float eps) override {
    cuda::gated_rms_norm(out, y, z, weight, n_group, eps, stream_);
  }
  void ssd_mixer(const Tensor& y, const Tensor& xbc, const SsdMixer& in, const Tensor& conv_state,
                 const Tensor& ssm_state, const Batch& batch) override {
    if (cuda::ssd_mixer_step(y, in, conv_state, ssm_state, batch, stream_)) return;
    if (batch.max_len > 1 &&
        cuda::ssd_mixer_chunks(y, xbc, in, conv_state, ssm_state, batch, ssd_scratch(), stream_)) {
      return;
    }
    Ops::ssd_mixer(y, xbc, in, conv_state, ssm_state, batch);
  }
  void sample(const Tensor& logits, int64_t vocab, const SampleState& state, const Tensor& slot,
              int64_t n_seq) override {
    cuda::sample(logits, vocab, state, slot, n_seq, mailbox_, stream_);
  }

  void log_prob(const Tensor& logprob, const Tensor& best, const Tensor& logits, int64_t vocab,
                const Tensor& target) override {
    cuda::log_prob(logprob, best, logits, vocab, target, stream_);
  }

  void receive(std::span<int32_t> tokens) override {
    const uint64_t wanted = received_ + 1;
    const volatile uint64_t* row = mailbox_.ring + received_ % Mailbox::kPosts * Mailbox::kMaxRows;
    int spin = 0;
    for (size_t i = 0; i < tokens.size(); ++i) {
      const auto arrived = [&] {
        const uint64_t word = row[i];
        tokens[i] = static_cast<int32_t>(word & 0xffffffffU);
        return word >> 32 == (wanted & 0xffffffffU);
      };
      for (; !arrived(); ++spin) {
        if (spin % 4096 != 4095) continue;
        // A kernel that failed never posts: ask now and then, and give the core away while waiting.
        const cudaError_t status = cudaStreamQuery(stream_);
        if (status == cudaSuccess && !arrived()) {
          throw Error(ErrorKind::runtime, "receive() without a sample() to wait for");
        }
        if (status != cudaErrorNotReady) KRAIT_CUDA(status);
        std::this_thread::yield();
      }
    }
    received_ = wanted;
  }

  double seconds(const std::function<void()>& work) override {
    struct Event {
      cudaEvent_t event = nullptr;
      Event() { KRAIT_CUDA(cudaEventCreate(&event)); }
      ~Event() { cudaEventDestroy(event); }
      Event(const Event&) = delete;
      Event& operator=(const Event&) = delete;
    };
    const Event begin;
    const Event end;
    KRAIT_CUDA(cudaEventRecord(begin.event, stream_));
    work();
    KRAIT_CUDA(cudaEventRecord(end.event, stream_));
    KRAIT_CUDA(cudaEventSynchronize(end.event));
    float milliseconds = 0;
    KRAIT_CUDA(cudaEventElapsedTime(&milliseconds, begin.event, end.event));
    return static_cast<double>(milliseconds) * 1e-3;
  }
  void stream_copy(void* dst, const void* src, size_t bytes) override {
    cuda::stream_copy(dst, src, bytes, stream_);
  }
  void stream_read(void* sum, const void* src, size_t bytes) override {
    cuda::stream_read(sum, src, bytes, stream_);
  }

  // ---- whole steps ------------------------------------------------------------------------------

  bool mamba1_step(const Mamba1Weights& weights, const Tensor& logits, const Tensor& ids,
                   const Batch& batch, std::span<const std::vector<Tensor>> state) override {
    return mamba1_stepper_.run(weights, logits, ids, batch, state, stream_);
  }
  bool mamba2_step(const Mamba2Weights& weights, const Tensor& logits, const Tensor& ids,
                   const Batch& batch, std::span<const std::vector<Tensor>> state) override {
    return mamba2_stepper_.run(weights, logits, ids, batch, state, stream_);
  }

  /// The first time a step runs as it is (libraries set themselves up). It is captured the second
  /// time if nothing else came between, else when it has come so often that a capture may pay;
  /// later if its products still try algorithms.
  void replay(uint64_t key, const std::function<void()>& step) override {
    const bool again = std::exchange(last_key_, key) == key;
    Step& s = remembered(key);
    if (s.graph == nullptr) {
      if ((++s.runs < kRunsToCapture && !again) || (s.choosing && s.runs < kRunsToChoose)) {
        const uint64_t n_open = gemm_->n_open();
        run_step(step);
        s.choosing = gemm_->n_open() > n_open;
        return;
      }
      cudaGraph_t graph = nullptr;
      KRAIT_CUDA(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
      read_early_.emplace();
      try {
        run_step(step);
        read_early_.reset();
      } catch (...) {
        read_early_.reset();
        cudaStreamEndCapture(stream_, &graph);
        if (graph != nullptr) cudaGraphDestroy(graph);
        (void)cudaGetLastError();
        throw;
      }
      KRAIT_CUDA(cudaStreamEndCapture(stream_, &graph));
      const cudaError_t status = cudaGraphInstantiate(&s.graph, graph, 0);
      cudaGraphDestroy(graph);
      KRAIT_CUDA(status);
    }
    KRAIT_CUDA(cudaGraphLaunch(s.graph, stream_));
  }

 private:
  /// "580.95.05 (CUDA 13.0)": the kernel module's version, where it can be seen, and the newest
  /// CUDA that it runs.
  static std::string driver() {
    std::ifstream in("/proc/driver/nvidia/version");
    std::string found;
    for (std::string word; found.empty() && in >> word;) {
      const bool version = word.find('.') != std::string::npos &&
                           word.find_first_not_of("0123456789.") == std::string::npos;
      if (version) found = word + " ";
    }
    int cuda = 0;
    KRAIT_CUDA(cudaDriverGetVersion(&cuda));
    return fmt::format("{}(CUDA {}.{})", found, cuda / 1000, cuda % 1000 / 10);
  }

  [[nodiscard]] std::string clocks(const cudaDeviceProp& prop) const {
    int core = 0;
    int memory = 0;
    KRAIT_CUDA(cudaDeviceGetAttribute(&core, cudaDevAttrClockRate, index_));  // kHz, the highest
    KRAIT_CUDA(cudaDeviceGetAttribute(&memory, cudaDevAttrMemoryClockRate, index_));
    return fmt::format("{} SMs up to {} MHz, memory {} MHz", prop.multiProcessorCount, core / 1000,
                       memory / 1000);
  }

  struct Step {
    cudaGraphExec_t graph = nullptr;
    int runs = 0;           ///< before it was captured
    bool choosing = false;  ///< products of the last of them were open
    uint64_t last_use = 0;  ///< in calls of replay
  };

  /// The step of `key`. Of too many the one that was not asked for longest is forgotten; it may
  /// still run.
  Step& remembered(uint64_t key) {
    if (steps_.size() >= kMostSteps && !steps_.contains(key)) {
      const auto oldest = std::ranges::min_element(
          steps_, {}, [](const auto& step) { return step.second.last_use; });
      if (oldest->second.graph != nullptr) cudaGraphExecDestroy(oldest->second.graph);
      steps_.erase(oldest);
    }
    Step& s = steps_[key];
    s.last_use = ++n_replay_;
    return s;
  }

  /// Whether a verb of a captured step may read `state` before the kernels before it are done. The
  /// launch of a graph waits for all that came before, and of a graph only the verb that has a
  /// state writes it: so the first one may. Behind cuBLASLt's products, which let nobody start
  /// early, it would gain nothing.
  bool early(const Tensor& state, const Batch& batch) {
    return capturing() && batch.n_seq <= kEarlyRows && read_early_->insert(state.data).second;
  }

  [[nodiscard]] bool capturing() const { return read_early_.has_value(); }

  /// Calls `step`, of which products may run aside, in the same way when it is captured and before.
  void run_step(const std::function<void()>& step) {
    in_step_ = true;
    try {
      step();
      settle();
    } catch (...) {
      in_step_ = settling_ = false;
      throw;
    }
    in_step_ = false;
  }

  /// Blocks of our own product of so many rows. One of them fills the shared memory of a
  /// multiprocessor: products beside each other divide the multiprocessors, or else each waits for
  /// the other's blocks to leave. H100, 2.8b: steps of 16 and 32 sequences 6 to 7% shorter so, of
  /// 64 1.6%, of 128 0.4%; 1.4b: 8% at 16, 3 to 6% at 64 and 128.
  [[nodiscard]] int most_blocks(int64_t n_row, bool aside) const {
    const int n_sm = device_attribute(cudaDevAttrMultiProcessorCount);
    if (!settling_) return std::numeric_limits<int>::max();
    return n_sm * (aside && n_row > 32 ? 41 : 31) / 100;
  }

  /// `aside`: beside what else there is between linear_soon and settle, in a captured step. Before
  /// it is captured only the stream differs, and no bit: a kernel on a second stream can leave the
  /// process' later steps with gaps of 0.95 and 0.47 us between their nodes for 0.25 and 0.12
  /// (H100, driver 580: 2 to 6% of a step). It is not the only way there.
  void product(const Tensor& out, const Tensor& in, const Tensor& W, const Tensor& bias,
               bool accumulate, bool aside = false) {
    const cudaStream_t stream = aside && capturing() ? aside_ : stream_;
    // A few rows of a small matrix are sooner read than a ring is set up.
    const bool brief = in.dim(0) <= kGemvRows && W.bytes() < kRingBytes;
    const int blocks = most_blocks(in.dim(0), aside);
    if (!brief && skinny_gemm(out, in, W, bias, accumulate, blocks, stream)) return;
    Gemm& gemm = aside ? *aside_gemm_ : *gemm_;
    if (in.dim(0) > kGemvRows && gemm.run(out, in, W, accumulate, stream)) {
      if (bias) add_bias(out, bias, stream);
      return;
    }
    gemv(out, in, W, bias, accumulate, stream);
  }

  /// Room for one weight: small ones share slabs, since each cudaMalloc takes 2 MB at least.
  void* place(size_t bytes) {
    constexpr size_t kSlab = size_t{64} << 20;
    constexpr size_t kAlign = 256;
    if (bytes > kSlab / 4) {
      slabs_.push_back(allocate(bytes, "weights"));
      return slabs_.back().data();
    }
    if (slab_left_ < bytes) {
      slabs_.push_back(allocate(kSlab, "weights"));
      slab_next_ = static_cast<std::byte*>(slabs_.back().data());
      slab_left_ = kSlab;
    }
    void* p = slab_next_;
    const size_t used = std::min(slab_left_, (bytes + kAlign - 1) / kAlign * kAlign);
    slab_next_ += used;
    slab_left_ -= used;
    return p;
  }

  void* ssd_scratch() {
    if (ssd_scratch_.data() == nullptr) {
      ssd_scratch_ = allocate(ssd_scratch_bytes(), "states of the scan's segments");
    }
    return ssd_scratch_.data();
  }

  void make_mailbox() {
    constexpr size_t kRing = sizeof(uint64_t) * Mailbox::kPosts * Mailbox::kMaxRows;
    void* host = nullptr;
    KRAIT_CUDA(cudaMallocHost(&host, kRing));
    mailbox_host_ = Buffer(host, kRing, free_pinned);
    std::memset(host, 0, mailbox_host_.bytes());
    constexpr size_t kScratch = sizeof(uint64_t) * Mailbox::kMaxRows * Mailbox::kParts;
    mailbox_device_ = allocate(kScratch + sizeof(uint64_t), "mailbox");
    mailbox_.ring = static_cast<volatile uint64_t*>(host);
    mailbox_.part_best = static_cast<uint64_t*>(mailbox_device_.data());
    mailbox_.posts = mailbox_.part_best + kScratch / sizeof(uint64_t);
    zero(mailbox_.posts, sizeof(uint64_t));
  }

  int index_;
  cudaStream_t stream_ = nullptr;
  cudaStream_t aside_ = nullptr;  ///< beside it in captured steps, between linear_soon and settle
  cudaEvent_t forked_ = nullptr;
  cudaEvent_t joined_ = nullptr;
  bool in_step_ = false;
  bool settling_ = false;  ///< something runs aside
  std::vector<Buffer> slabs_;
  std::byte* slab_next_ = nullptr;
  size_t slab_left_ = 0;
  WeightStream weights_;
  Staging staging_;
  std::unique_ptr<Gemm> gemm_;
  std::unique_ptr<Gemm> aside_gemm_;  ///< with a workspace of its own
  Buffer ssd_scratch_;
  Mamba1Stepper mamba1_stepper_{
      [this](size_t bytes, std::string_view what) { return allocate(bytes, what); }};
  Mamba2Stepper mamba2_stepper_{
      [this](size_t bytes, std::string_view what) { return allocate(bytes, what); }};
  Buffer mailbox_host_;
  Buffer mailbox_device_;
  Mailbox mailbox_;
  uint64_t received_ = 0;
  std::unordered_map<uint64_t, Step> steps_;
  uint64_t n_replay_ = 0;
  uint64_t last_key_ = 0;  ///< of replay; no key is 0
  /// The states that verbs of the step had so far; only while it is captured.
  std::optional<std::unordered_set<const void*>> read_early_;
};

}  // namespace
}  // namespace krait::cuda

namespace krait {

std::unique_ptr<Ops> make_cuda_ops(int index) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess || count == 0) {
    (void)cudaGetLastError();
    throw Error(ErrorKind::device,
                fmt::format("no CUDA device was found ({})",
                            status == cudaSuccess ? "none is visible" : cudaGetErrorString(status)),
                "check the NVIDIA driver with nvidia-smi, or use --device cpu");
  }
  if (index < 0 || index >= count) {
    throw Error(ErrorKind::device, fmt::format("CUDA device {} was asked for, but there {} {}",
                                               index, count == 1 ? "is only" : "are", count));
  }
  return std::make_unique<cuda::CudaOps>(index);
}

int cuda_device_count() noexcept {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    (void)cudaGetLastError();
    return 0;
  }
  return count;
}

}  // namespace krait
