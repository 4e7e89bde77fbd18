// Python's view of the engines. Nothing is decided here: arguments are checked by the Python side, outcomes by
// completion.hpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <system_error>

#include "engine.hpp"

namespace py = pybind11;
using namespace tierflow::aio;

namespace {

// Keeps an object's memory exported, hence in place and not resized, for as long as it lives.
class View {
 public:
  View(const py::object& object, bool writable) {
    if (PyObject_GetBuffer(object.ptr(), &view_, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) != 0) {
      throw py::error_already_set();
    }
  }
  ~View() { PyBuffer_Release(&view_); }
  View(const View&) = delete;
  View& operator=(const View&) = delete;
  uintptr_t address() const { return reinterpret_cast<uintptr_t>(view_.buf); }
  uint64_t nbytes() const { return static_cast<uint64_t>(view_.len); }

 private:
  Py_buffer view_;
};

// In slices, so that Ctrl-C is answered: the transfer goes on, the caller does not have to wait for it.
int wait(Ticket& ticket) {
  for (;;) {
    bool done;
    {
      py::gil_scoped_release release;
      done = ticket.wait_for(std::chrono::milliseconds(100));
    }
    if (done) return ticket.failure().error;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }
}

TicketPtr submit(Engine& engine, std::shared_ptr<File> file, bool write, uintptr_t address, uint64_t offset,
                 uint64_t nbytes) {
  TicketPtr ticket(new Ticket(write ? Op::Write : Op::Read, std::move(file), reinterpret_cast<char*>(address), offset,
                              nbytes),
                   LeakInChild{});
  py::gil_scoped_release release;
  engine.submit(ticket);
  return ticket;
}

void translate(std::exception_ptr raised) {
  try {
    if (raised) std::rethrow_exception(raised);
  } catch (const std::system_error& error) {
    const py::tuple arguments = py::make_tuple(error.code().value(), error.what());
    PyErr_SetObject(PyExc_OSError, arguments.ptr());
  }
}

}  // namespace

PYBIND11_MODULE(_aio, m) {
  py::register_local_exception_translator(translate);
  m.attr("BUILT_WITH_IO_URING") = built_with_uring();
  m.attr("END_OF_FILE") = kEndOfFile;
  m.def("probe_io_uring", &probe_uring, py::call_guard<py::gil_scoped_release>());
  m.def("filesystem_magic", &filesystem_magic, py::arg("fd"));
  m.def("reserve", &reserve, py::arg("fd"), py::arg("nbytes"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "direct_alignment",
      [](int fd) -> py::object {
        const auto found = direct_alignment(fd);
        return found ? py::object(py::make_tuple(found->memory, found->offset)) : py::object(py::none());
      },
      py::arg("fd"));

  py::class_<View>(m, "View")
      .def(py::init<const py::object&, bool>(), py::arg("object"), py::arg("writable"))
      .def_property_readonly("address", &View::address)
      .def_property_readonly("nbytes", &View::nbytes);

  py::class_<File, std::shared_ptr<File>>(m, "File")
      .def(py::init<int, uint64_t, bool>(), py::arg("fd"), py::arg("alignment"), py::arg("direct"))
      .def_property_readonly("fd", &File::fd)
      .def("close", &File::close);

  py::class_<Ticket, std::shared_ptr<Ticket>>(m, "Ticket")
      .def("done", &Ticket::done)
      .def("wait", &wait)
      .def_property_readonly("failed_offset", [](const Ticket& t) { return t.failure().offset; })
      .def_property_readonly("failed_length", [](const Ticket& t) { return t.failure().length; })
      .def_property_readonly("seconds", &Ticket::seconds)
      .def_property_readonly("began", &Ticket::began)
      .def_property_readonly("ended", &Ticket::ended);

  py::class_<Engine, EnginePtr>(m, "Engine")
      .def("submit", &submit, py::arg("file"), py::arg("write"), py::arg("address"), py::arg("offset"),
           py::arg("nbytes"))
      .def("close", &Engine::close, py::call_guard<py::gil_scoped_release>())
      .def("abandon", &Engine::abandon)
      .def("bytes_moved", [](Engine& e, bool write) { return e.bytes_moved(write ? Op::Write : Op::Read); },
           py::arg("write"))
      .def("busy_seconds", [](Engine& e, bool write) { return e.busy_seconds(write ? Op::Write : Op::Read); },
           py::arg("write"));

  m.def("thread_engine", &make_thread_engine, py::arg("block_size"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
  m.def("uring_engine", &make_uring_engine, py::arg("block_size"), py::arg("queue_depth"),
        py::call_guard<py::gil_scoped_release>());
}
