/* Process-group backends written in Python that torch's C++ can use in full: a Backend to subclass, works, typed futures.
 *
 * torch before 2.14 lets Python subclass only ProcessGroup, and forwards only some of its calls. Here c10d::Backend can be
 * subclassed: each virtual calls the Python method of the name that torch gives it in Python. Optional: compiled against the
 * installed torch (2.4 and newer) by hfreduce/torch/shim.py. Virtuals that not all of these have are without `override`. */
#include <pybind11/chrono.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <torch/csrc/jit/python/pybind_utils.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <string>

namespace {

using c10d::OpType;
using c10d::Work;
using torch::jit::PythonFutureWrapper;
using Tensors = std::vector<at::Tensor>;
using TensorLists = std::vector<Tensors>;
using Sizes = std::vector<int64_t>;
template <typename T>
using Ptr = c10::intrusive_ptr<T>;

/* --- the interpreter --- */

/* Whether this thread may take the GIL: not once the interpreter is gone, nor from another thread while it goes. */
bool python_runs() {
  if (!Py_IsInitialized()) return false;
#if PY_VERSION_HEX >= 0x030d0000
  bool finalizing = Py_IsFinalizing() != 0;
#else
  bool finalizing = _Py_IsFinalizing() != 0;
#endif
  return !finalizing || PyGILState_Check();
}

bool require_python() {
  if (!python_runs()) throw std::runtime_error("hfreduce: the Python interpreter is ending; this group can no longer be used");
  return true;
}

PyObject *own(PyObject *object) {
  Py_INCREF(object);
  return object;
}

/* The GIL, or an exception. */
class Gil {
  bool running_ = require_python();
  py::gil_scoped_acquire gil_;
};

/* A reference to a Python object that any thread may drop; at the end of the process it is leaked. */
class Reference {
 public:
  explicit Reference(py::object object) : object_(object.release().ptr()) {}
  Reference(const Reference &) = delete;
  Reference &operator=(const Reference &) = delete;
  ~Reference() {
    if (!python_runs()) return;
    py::gil_scoped_acquire gil;
    Py_DECREF(object_);
  }
  PyObject *get() const { return object_; }

 private:
  PyObject *object_;
};

/* A Python exception as C++ carries it, between threads and past the interpreter's end. Made under the GIL. */
struct PythonException : python_error {
  explicit PythonException(py::handle exception) {
    type = own(reinterpret_cast<PyObject *>(Py_TYPE(exception.ptr())));
    value = own(exception.ptr());
    traceback = PyException_GetTraceback(exception.ptr());
    build_message();
  }
  PythonException(const PythonException &) = default;
  PythonException(PythonException &&) = default;
  ~PythonException() override {
    if (!python_runs()) type = value = traceback = nullptr;
  }
};

/* --- Python methods that stand for C++ ones --- */

/* A method's name, and the other one under which it goes. */
class Name {
 public:
  Name(const char *first, const char *second = nullptr) : text_{first, second} {}

  /* The attribute if the object's class defines it; what it has from `base`, torch's class, would only call back. */
  py::object find(PyObject *self, PyTypeObject *base) const {
    for (int i = 0; i < 2 && text_[i] != nullptr; i++) {
      if (interned_[i] == nullptr) interned_[i] = PyUnicode_InternFromString(text_[i]);
      py::object mine = get(reinterpret_cast<PyObject *>(Py_TYPE(self)), interned_[i]);
      if (mine && !mine.is(get(reinterpret_cast<PyObject *>(base), interned_[i]))) {
        py::object bound = py::reinterpret_steal<py::object>(PyObject_GetAttr(self, interned_[i]));
        if (!bound) throw py::error_already_set();
        return bound;
      }
    }
    return {};
  }
  const char *text() const { return text_[0]; }

 private:
  static py::object get(PyObject *from, PyObject *name) {
    PyObject *found = from == nullptr ? nullptr : PyObject_GetAttr(from, name);
    if (found == nullptr) PyErr_Clear();
    return py::reinterpret_steal<py::object>(found);
  }

  const char *text_[2];
  mutable PyObject *interned_[2] = {nullptr, nullptr}; /* written under the GIL, never freed */
};

PyTypeObject *python_type(const std::type_info &type) {
  py::detail::type_info *info = py::detail::get_type_info(type);
  return info == nullptr ? nullptr : info->type;
}

PyTypeObject *work_type() {
  static PyTypeObject *type = python_type(typeid(Work));
  return type;
}

/* --- works --- */

/* What C++ sees of a work that a Python method returned; owns that work, which need not be a torch Work. */
class PythonWork : public Work {
 public:
  PythonWork(int rank, OpType type, py::object work, Ptr<Work> native)
      : Work(rank, type), native_(std::move(native)), work_(std::move(work)) {}

  bool isCompleted() override {
    static const Name name("is_completed");
    return call<bool>(name, [&] { return native_ ? native_->isCompleted() : Work::isCompleted(); });
  }
  bool isSuccess() const override {
    static const Name name("is_success");
    return call<bool>(name, [&] { return native_ ? native_->isSuccess() : Work::isSuccess(); });
  }
  std::exception_ptr exception() const override {
    static const Name name("exception");
    {
      Gil gil;
      if (py::object method = find(name)) {
        py::object error = method();
        return error.is_none() ? nullptr : std::make_exception_ptr(PythonException(error));
      }
    }
    return native_ ? native_->exception() : Work::exception();
  }
  int sourceRank() const override {
    static const Name name("source_rank", "_source_rank");
    return call<int>(name, [&] { return native_ ? native_->sourceRank() : Work::sourceRank(); });
  }
  Tensors result() override {
    static const Name name("result");
    return call<Tensors>(name, [&] { return native_ ? native_->result() : Work::result(); });
  }
  void synchronize() override {
    static const Name name("synchronize");
    call<void>(name, [&] { native_ ? native_->synchronize() : Work::synchronize(); });
  }
  bool wait(std::chrono::milliseconds timeout) override {
    static const Name name("wait");
    {
      Gil gil;
      if (py::object method = find(name)) {
        py::object done = timeout == kNoTimeout ? method() : method(timeout);
        return done.is_none() || done.cast<bool>();
      }
    }
    return native_ ? native_->wait(timeout) : Work::wait(timeout);
  }
  void blockCurrentStream() {
    static const Name name("block_current_stream", "synchronize");
    call<void>(name, [&] { native_ ? native_->synchronize() : Work::synchronize(); });
  }
  void abort() override {
    static const Name name("abort");
    call<void>(name, [&] { native_ ? native_->abort() : Work::abort(); });
  }
  Ptr<c10::ivalue::Future> getFuture() override {
    static const Name name("get_future", "getFuture");
    return future(name, [&] { return native_ ? native_->getFuture() : Work::getFuture(); });
  }
  Ptr<c10::ivalue::Future> getFutureResult() {
    static const Name name("get_future_result");
    return future(name, []() -> Ptr<c10::ivalue::Future> { throw std::runtime_error("this work has no get_future_result"); });
  }
  float getDuration() const override {
    static const Name name("_get_duration");
    return call<float>(name, [&] { return native_ ? native_->getDuration() : Work::getDuration(); });
  }
  uint64_t getSequencenumber() const override {
    static const Name name("_get_sequence_number", "getSequencenumber");
    return call<uint64_t>(name, [&] { return native_ ? native_->getSequencenumber() : Work::getSequencenumber(); });
  }

 private:
  py::object find(const Name &name) const { return name.find(work_.get(), native_ ? work_type() : nullptr); }
  template <typename R, typename Otherwise>
  R call(const Name &name, Otherwise otherwise) const {
    {
      Gil gil;
      if (py::object method = find(name)) {
        py::object result = method();
        if constexpr (std::is_void_v<R>)
          return;
        else
          return result.template cast<R>();
      }
    }
    return otherwise();
  }
  template <typename Otherwise>
  Ptr<c10::ivalue::Future> future(const Name &name, Otherwise otherwise) const {
    {
      Gil gil;
      if (py::object method = find(name)) return method().template cast<std::shared_ptr<PythonFutureWrapper>>()->fut;
    }
    return otherwise();
  }

  Ptr<Work> native_; /* null where the Python class is none of torch's */
  Reference work_;   /* declared last: dropped first, while native_ still stands */
};

/* A method's return value as a Work. One of torch's own passes as it is. */
Ptr<Work> as_work(py::object result, int rank, OpType type) {
  if (result.is_none()) return nullptr;
  if (!py::isinstance<Work>(result)) return c10::make_intrusive<PythonWork>(rank, type, std::move(result), nullptr);
  Ptr<Work> native = result.cast<Ptr<Work>>();
  py::detail::type_info *info = py::detail::get_type_info(Py_TYPE(result.ptr()));
  if (info != nullptr && info->type == Py_TYPE(result.ptr())) return native;
  return c10::make_intrusive<PythonWork>(rank, type, std::move(result), std::move(native));
}

/* --- the backend --- */

/* Body of a virtual that starts an operation: the Python method's work. */
#define HFR_WORK(type, names, ...)                                                                    \
  {                                                                                                   \
    static const Name name names;                                                                     \
    Gil gil;                                                                                          \
    if (py::object method = find(name)) return as_work(method(__VA_ARGS__), getRank(), OpType::type); \
    unsupported(name);                                                                                \
  }

/* A Backend whose methods are those of its Python subclass.
 *
 * C++ may be its only owner, and the methods live in the Python object: it holds on to that object. The cycle that this makes
 * is shown to Python's collector (traverse, clear) once no C++ owner is left. */
class Backend : public c10d::Backend {
 public:
  Backend(int rank, int size, PyObject *self) : c10d::Backend(rank, size), self_(own(self)) {}

  static int traverse(PyObject *object, visitproc visit, void *arg) {
#if PY_VERSION_HEX >= 0x03090000
    Py_VISIT(Py_TYPE(object));
#endif
    auto held = reinterpret_cast<py::detail::instance *>(object)->get_value_and_holder();
    if (held.holder_constructed() && held.holder<Ptr<Backend>>().use_count() == 1) Py_VISIT(held.holder<Ptr<Backend>>()->self_);
    return 0;
  }
  static int clear(PyObject *object) {
    auto held = reinterpret_cast<py::detail::instance *>(object)->get_value_and_holder();
    if (held.holder_constructed()) Py_CLEAR(held.holder<Ptr<Backend>>()->self_);
    return 0;
  }

  const std::string getBackendName() const override {
    static const Name name("getBackendName", "name");
    Gil gil;
    py::object method = find(name);
    return method ? method().cast<std::string>() : "hfreduce";
  }
  bool supportsSplitting() const override {
    static const Name name("supports_splitting");
    return flag(name);
  }
  bool supportsCoalescing() const {
    static const Name name("supports_coalescing");
    return flag(name);
  }
  void setTimeout(std::chrono::milliseconds timeout) {
    static const Name name("set_timeout", "_set_default_timeout");
    call(name, timeout);
  }
  void startCoalescing() override {
    static const Name name("start_coalescing", "_start_coalescing");
    call(name);
  }
  Ptr<Work> endCoalescing() override HFR_WORK(COALESCED, ("end_coalescing", "_end_coalescing"));
  Ptr<Options> getBackendOptions() {
    static const Name name("options");
    Gil gil;
    py::object options = find(name);
    if (!options) unsupported(name);
    return options.cast<Ptr<Options>>();
  }

  Ptr<Work> broadcast(Tensors &tensors, const c10d::BroadcastOptions &opts) override
      HFR_WORK(BROADCAST, ("broadcast"), tensors, opts);
  Ptr<Work> allreduce(Tensors &tensors, const c10d::AllreduceOptions &opts) override
      HFR_WORK(ALLREDUCE, ("allreduce"), tensors, opts);
  Ptr<Work> allreduce_sparse(Tensors &tensors, const c10d::AllreduceOptions &opts) override
      HFR_WORK(_ALLREDUCE_SPARSE, ("allreduce_sparse"), tensors, opts);
  Ptr<Work> allreduce_coalesced(Tensors &tensors, const c10d::AllreduceCoalescedOptions &opts) override
      HFR_WORK(ALLREDUCE_COALESCED, ("allreduce_coalesced"), tensors, opts);
  Ptr<Work> reduce(Tensors &tensors, const c10d::ReduceOptions &opts) override HFR_WORK(REDUCE, ("reduce"), tensors, opts);
  Ptr<Work> allgather(TensorLists &outputs, Tensors &inputs, const c10d::AllgatherOptions &opts) override
      HFR_WORK(ALLGATHER, ("allgather"), outputs, inputs, opts);
  Ptr<Work> _allgather_base(at::Tensor &output, at::Tensor &input, const c10d::AllgatherOptions &opts)
      HFR_WORK(_ALLGATHER_BASE, ("_allgather_base", "all_gather_single"), output, input, opts);
  Ptr<Work> all_gather_single(at::Tensor &output, at::Tensor &input, const c10d::AllgatherOptions &opts)
      HFR_WORK(_ALLGATHER_BASE, ("all_gather_single", "_allgather_base"), output, input, opts);
  Ptr<Work> allgather_coalesced(TensorLists &outputs, Tensors &inputs, const c10d::AllgatherOptions &opts)
      HFR_WORK(ALLGATHER_COALESCED, ("allgather_coalesced"), outputs, inputs, opts);
  Ptr<Work> allgather_into_tensor_coalesced(Tensors &outputs, Tensors &inputs, const c10d::AllgatherOptions &opts)
      HFR_WORK(COALESCED, ("allgather_into_tensor_coalesced", "all_gather_single_coalesced"), outputs, inputs, opts);
  Ptr<Work> all_gather_single_coalesced(Tensors &outputs, Tensors &inputs, const c10d::AllgatherOptions &opts)
      HFR_WORK(COALESCED, ("all_gather_single_coalesced", "allgather_into_tensor_coalesced"), outputs, inputs, opts);
  Ptr<Work> gather(TensorLists &outputs, Tensors &inputs, const c10d::GatherOptions &opts) override
      HFR_WORK(GATHER, ("gather"), outputs, inputs, opts);
  Ptr<Work> gather_single(at::Tensor &output, at::Tensor &input, const c10d::GatherOptions &opts)
      HFR_WORK(GATHER, ("gather_single", "gather_into_tensor"), output, input, opts);
  Ptr<Work> gather_into_tensor(at::Tensor &output, at::Tensor &input, const c10d::GatherOptions &opts)
      HFR_WORK(GATHER, ("gather_into_tensor", "gather_single"), output, input, opts);
  Ptr<Work> scatter(Tensors &outputs, TensorLists &inputs, const c10d::ScatterOptions &opts) override
      HFR_WORK(SCATTER, ("scatter"), outputs, inputs, opts);
  Ptr<Work> reduce_scatter(Tensors &outputs, TensorLists &inputs, const c10d::ReduceScatterOptions &opts) override
      HFR_WORK(REDUCE_SCATTER, ("reduce_scatter"), outputs, inputs, opts);
  Ptr<Work> _reduce_scatter_base(at::Tensor &output, at::Tensor &input, const c10d::ReduceScatterOptions &opts)
      HFR_WORK(_REDUCE_SCATTER_BASE, ("_reduce_scatter_base", "reduce_scatter_single"), output, input, opts);
  Ptr<Work> reduce_scatter_single(at::Tensor &output, at::Tensor &input, const c10d::ReduceScatterOptions &opts)
      HFR_WORK(_REDUCE_SCATTER_BASE, ("reduce_scatter_single", "_reduce_scatter_base"), output, input, opts);
  Ptr<Work> reduce_scatter_tensor_coalesced(Tensors &outputs, Tensors &inputs, const c10d::ReduceScatterOptions &opts)
      HFR_WORK(COALESCED, ("reduce_scatter_tensor_coalesced", "reduce_scatter_single_coalesced"), outputs, inputs, opts);
  Ptr<Work> reduce_scatter_single_coalesced(Tensors &outputs, Tensors &inputs, const c10d::ReduceScatterOptions &opts)
      HFR_WORK(COALESCED, ("reduce_scatter_single_coalesced", "reduce_scatter_tensor_coalesced"), outputs, inputs, opts);
  Ptr<Work> alltoall_base(at::Tensor &output, at::Tensor &input, Sizes &output_sizes, Sizes &input_sizes,
                          const c10d::AllToAllOptions &opts)
      HFR_WORK(ALLTOALL_BASE, ("alltoall_base", "all_to_all_single"), output, input, output_sizes, input_sizes, opts);
  Ptr<Work> all_to_all_single(at::Tensor &output, at::Tensor &input, Sizes &output_sizes, Sizes &input_sizes,
                              const c10d::AllToAllOptions &opts)
      HFR_WORK(ALLTOALL_BASE, ("all_to_all_single", "alltoall_base"), output, input, output_sizes, input_sizes, opts);
  Ptr<Work> alltoall(Tensors &outputs, Tensors &inputs, const c10d::AllToAllOptions &opts) override
      HFR_WORK(ALLTOALL, ("alltoall"), outputs, inputs, opts);
  Ptr<Work> send(Tensors &tensors, int peer, int tag) override HFR_WORK(SEND, ("send"), tensors, peer, tag);
  Ptr<Work> recv(Tensors &tensors, int peer, int tag) override HFR_WORK(RECV, ("recv"), tensors, peer, tag);
  Ptr<Work> recvAnysource(Tensors &tensors, int tag) override
      HFR_WORK(RECVANYSOURCE, ("recv_anysource", "recvAnysource"), tensors, tag);
  Ptr<Work> barrier(const c10d::BarrierOptions &opts) override HFR_WORK(BARRIER, ("barrier"), opts);

  void monitoredBarrier(const c10d::BarrierOptions &opts, bool wait_all_ranks) override {
    static const Name name("monitored_barrier");
    call(name, opts, wait_all_ranks);
  }
  void setSequenceNumberForGroup() override {
    static const Name name("_set_sequence_number_for_group", "setSequenceNumberForGroup");
    call(name);
  }
  uint64_t getSequenceNumberForGroup() override {
    static const Name name("_get_sequence_number_for_group", "getSequenceNumberForGroup");
    Gil gil;
    py::object method = find(name);
    if (!method) unsupported(name);
    return method().cast<uint64_t>();
  }
  void eagerConnectSingleDevice(at::Device device) override {
    static const Name name("eager_connect_single_device");
    Gil gil;
    if (py::object method = find(name)) method(device);
  }
  Ptr<c10d::Backend> split(const Ptr<c10d::Store> &store, const std::vector<int> &ranks, const Ptr<Options> &opts) {
    static const Name name("split");
    Gil gil;
    py::object method = find(name);
    if (!method) unsupported(name);
    py::object part = method(store, ranks, opts);
    return part.is_none() ? nullptr : part.cast<Ptr<c10d::Backend>>();
  }
  void abort() {
    static const Name name("abort");
    Gil gil;
    if (py::object method = find(name)) method();
  }
  void shutdown() {
    static const Name name("shutdown");
    Gil gil;
    if (py::object method = find(name)) method();
  }

 private:
  py::object find(const Name &name) const {
    static PyTypeObject *base = python_type(typeid(Backend));
    return self_ == nullptr ? py::object() : name.find(self_, base);
  }
  [[noreturn]] void unsupported(const Name &name) const {
    throw std::runtime_error("Backend " + getBackendName() + " does not support " + name.text());
  }
  bool flag(const Name &name) const {
    Gil gil;
    py::object value = find(name);
    if (!value) return false;
    return PyCallable_Check(value.ptr()) ? value().cast<bool>() : value.cast<bool>();
  }
  template <typename... Args>
  void call(const Name &name, Args &&...args) const {
    Gil gil;
    py::object method = find(name);
    if (!method) unsupported(name);
    method(std::forward<Args>(args)...);
  }

  PyObject *self_; /* owned; null once the collector has cleared it */
};

/* --- futures --- */

std::shared_ptr<PythonFutureWrapper> make_future(const std::vector<c10::Device> &devices) {
  return std::make_shared<PythonFutureWrapper>(c10::make_intrusive<c10::ivalue::Future>(c10::ListType::ofTensors(), devices));
}

void complete(const std::shared_ptr<PythonFutureWrapper> &future, const Tensors &tensors) {
  py::gil_scoped_release unlocked; /* callbacks run in here */
  future->fut->markCompleted(c10::IValue(tensors));
}

void fail(const std::shared_ptr<PythonFutureWrapper> &future, py::handle exception) {
  if (!PyExceptionInstance_Check(exception.ptr())) throw py::type_error("fail: not an exception");
  std::exception_ptr error = std::make_exception_ptr(PythonException(exception));
  py::gil_scoped_release unlocked;
  future->fut->setError(std::move(error));
}

}  // namespace

PYBIND11_MODULE(_shim, m) {
  m.doc() = "torch's C++ interfaces for the hfreduce process group.";
  m.attr("TORCH") = std::to_string(TORCH_VERSION_MAJOR) + "." + std::to_string(TORCH_VERSION_MINOR) + "." +
                    std::to_string(TORCH_VERSION_PATCH); /* the one that it was built for */
  py::module_::import("torch.distributed");              /* registers c10d's types */

  py::class_<Backend, Ptr<Backend>, c10d::Backend>(
      m, "Backend", py::custom_type_setup([](PyHeapTypeObject *heap) {
        heap->ht_type.tp_flags |= Py_TPFLAGS_HAVE_GC;
        heap->ht_type.tp_traverse = Backend::traverse;
        heap->ht_type.tp_clear = Backend::clear;
      }),
      "A torch.distributed backend; a subclass defines the operations under their names in torch.\n\n"
      "An operation returns a Work: torch's, a subclass of it, or any object with its methods.")
      .def(
          "__init__",
          [](py::detail::value_and_holder &held, int rank, int size) {
            held.value_ptr() = new Backend(rank, size, reinterpret_cast<PyObject *>(held.inst));
          },
          py::detail::is_new_style_constructor(), py::arg("rank"), py::arg("size"));

  m.def("make_future", &make_future, py::arg("devices") = std::vector<c10::Device>(),
        "Make a torch future whose value will be a list of tensors, for C++ too. devices: where CUDA tensors will lie.");
  m.def("complete", &complete, py::arg("future"), py::arg("tensors"),
        "Complete a future of make_future. Its callbacks run in this thread; RuntimeError if it is complete.");
  m.def("fail", &fail, py::arg("future"), py::arg("exception"),
        "Complete a future of make_future with an exception, which those who wait for it raise.");
}
