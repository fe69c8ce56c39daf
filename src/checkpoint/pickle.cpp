#include "checkpoint/pickle.h"

#include <algorithm>
#include <cstring>
#include <unordered_map>

#include "base/error.h"
#include "checkpoint/parse.h"

namespace krait {

std::string_view kind_name(PickleValue::Kind kind) {
  constexpr std::string_view kNames[] = {"None",      "a boolean",       "an integer", "a float",
                                         "a string",  "a tuple or list", "a dict",     "a class",
                                         "an object", "a storage"};
  return kNames[static_cast<size_t>(kind)];
}

namespace {

using Kind = PickleValue::Kind;

// Of the pickles that Mamba checkpoints have, the largest run about 40 opcodes for a tensor.
constexpr size_t kMaxOpcodes = 2'000'000;

/// UTF-8 as Unicode defines it: no overlong forms, no surrogates, nothing past U+10FFFF.
bool is_utf8(std::string_view s) {
  for (size_t i = 0; i < s.size();) {
    const auto byte = [&](size_t k) {
      return k < s.size() ? static_cast<unsigned char>(s[k]) : static_cast<unsigned char>(0);
    };
    const unsigned char c = byte(i);
    const size_t n = c < 0x80                ? 1
                     : c >= 0xc2 && c < 0xe0 ? 2
                     : (c & 0xf0U) == 0xe0   ? 3
                     : c >= 0xf0 && c < 0xf5 ? 4
                                             : 0;
    if (n == 0 || n > s.size() - i) return false;
    for (size_t k = 1; k < n; ++k) {
      if ((byte(i + k) & 0xc0U) != 0x80) return false;
    }
    const unsigned char second = byte(i + 1);
    if ((c == 0xe0 && second < 0xa0) || (c == 0xed && second >= 0xa0) ||
        (c == 0xf0 && second < 0x90) || (c == 0xf4 && second >= 0x90)) {
      return false;
    }
    i += n;
  }
  return true;
}

class Machine {
 public:
  Machine(std::span<const std::byte> pickle, const std::string& name,
          std::span<const std::string_view> globals)
      : pickle_(pickle), name_(name), globals_(globals) {}

  Pickle run() {
    for (size_t n = 0; n < kMaxOpcodes; ++n) {
      opcode_at_ = at_;
      if (step(get<uint8_t>())) {
        out_.root = pop();
        return std::move(out_);
      }
    }
    fail(fmt::format("expected at most {} opcodes", kMaxOpcodes));
  }

 private:
  /// Runs one opcode; true for STOP. Names are those of Python's pickletools.
  bool step(uint8_t op) {
    switch (op) {
      case 0x80:  // PROTO
        if (const auto version = get<uint8_t>(); version != 2 && version != 3) {
          fail(fmt::format("expected protocol 2, found {}", version));
        }
        return false;
      case '.':  // STOP
        return true;
      case '(':  // MARK
        marks_.push_back(stack_.size());
        return false;

      case 'N':  // NONE
        push(Kind::none);
        return false;
      case 0x88:  // NEWTRUE
      case 0x89:  // NEWFALSE
        push(Kind::boolean);
        out_.values.back().integer = op == 0x88 ? 1 : 0;
        return false;
      case 'J':  // BININT
        push_integer(get<int32_t>());
        return false;
      case 'K':  // BININT1
        push_integer(get<uint8_t>());
        return false;
      case 'M':  // BININT2
        push_integer(get<uint16_t>());
        return false;
      case 0x8a:  // LONG1
        push_integer(get_long());
        return false;
      case 'G':  // BINFLOAT, eight bytes big-endian
        (void)take(8);
        push(Kind::real);
        return false;
      case 'X':  // BINUNICODE
        push_text(take(get<uint32_t>()));
        return false;
      case 'U':  // SHORT_BINSTRING
        push_text(take(get<uint8_t>()));
        return false;

      case ')':   // EMPTY_TUPLE
      case ']':   // EMPTY_LIST
      case 0x8f:  // EMPTY_SET
        push(Kind::sequence);
        return false;
      case '}':  // EMPTY_DICT
        push(Kind::dict);
        return false;
      case 't':  // TUPLE
        push(Kind::sequence, pop_to_mark());
        return false;
      case 0x85:  // TUPLE1
      case 0x86:  // TUPLE2
      case 0x87:  // TUPLE3
        push(Kind::sequence, pop_many(op - 0x84U));
        return false;
      case 'a':  // APPEND
        append(pop_many(1), Kind::sequence);
        return false;
      case 'e':   // APPENDS
      case 0x90:  // ADDITEMS
        append(pop_to_mark(), Kind::sequence);
        return false;
      case 's':  // SETITEM
        append(pop_many(2), Kind::dict);
        return false;
      case 'u':  // SETITEMS
        append(pop_to_mark(), Kind::dict);
        return false;

      case 'q':  // BINPUT
        memo_[get<uint8_t>()] = top();
        return false;
      case 'r':  // LONG_BINPUT
        memo_[get<uint32_t>()] = top();
        return false;
      case 'h':  // BINGET
        recall(get<uint8_t>());
        return false;
      case 'j':  // LONG_BINGET
        recall(get<uint32_t>());
        return false;

      case 'c':  // GLOBAL
        push_global();
        return false;
      case 'R':   // REDUCE
      case 0x81:  // NEWOBJ
        call();
        return false;
      case 'Q':  // BINPERSID
        push(Kind::persistent, pop_many(1));
        return false;
      case 'b':  // BUILD sets attributes of the object below, such as _metadata of a state dict
        (void)pop();
        (void)top();
        return false;
      default:
        fail(fmt::format("opcode 0x{:02x} is none that torch.save writes", op));
    }
  }

  std::string_view take(size_t n) {
    if (n > pickle_.size() - at_) fail("the pickle ends inside it");
    const std::string_view s(reinterpret_cast<const char*>(pickle_.data()) + at_, n);
    at_ += n;
    return s;
  }
  template <typename T>
  T get() {
    T v;
    std::memcpy(&v, take(sizeof v).data(), sizeof v);
    return v;
  }
  int64_t get_long() {
    const auto n = get<uint8_t>();
    if (n > sizeof(int64_t)) fail(fmt::format("expected an integer of 64 bits, found {}", n * 8));
    const std::string_view s = take(n);
    uint64_t v = 0;
    for (size_t i = 0; i < n; ++i) {
      v |= static_cast<uint64_t>(static_cast<unsigned char>(s[i])) << (8 * i);
    }
    const unsigned unused = 64 - 8U * n;  // two's complement of n bytes: extend the sign
    return n == 0 ? 0 : static_cast<int64_t>(v << unused) >> unused;
  }
  std::string_view get_line() {
    const auto rest = pickle_.subspan(at_);
    const auto end = std::find(rest.begin(), rest.end(), std::byte{'\n'});
    if (end == rest.end()) fail("the pickle ends inside it");
    const std::string_view line = take(static_cast<size_t>(end - rest.begin()));
    ++at_;
    return line;
  }

  void push(Kind kind, std::vector<uint32_t> items = {}) {
    stack_.push_back(static_cast<uint32_t>(out_.values.size()));
    PickleValue& v = out_.values.emplace_back();
    v.kind = kind;
    v.items = std::move(items);
  }
  void push_integer(int64_t v) {
    push(Kind::integer);
    out_.values.back().integer = v;
  }
  void push_text(std::string_view s) {
    if (!is_utf8(s)) fail("expected a string in UTF-8");
    push(Kind::text);
    out_.values.back().text = s;
  }
  void push_global() {
    const std::string_view module = get_line();
    const std::string_view name = get_line();
    const std::string full = fmt::format("{}.{}", module, name);
    const auto it = std::find(globals_.begin(), globals_.end(), full);
    if (it == globals_.end()) {
      throw Error(ErrorKind::unsupported,
                  fmt::format("{}: the pickle uses {}, which is not part of a plain state dict and "
                              "is not run",
                              name_, printable(full)),
                  "Save the model's state_dict() alone, or convert the checkpoint to safetensors.");
    }
    push(Kind::global);
    out_.values.back().text = *it;
  }
  void call() {
    std::vector<uint32_t> items = pop_many(2);
    if (out_[items[0]].kind != Kind::global || out_[items[1]].kind != Kind::sequence) {
      fail("expected a function and its arguments");
    }
    // An OrderedDict is made empty and filled by SETITEMS: it must be a dict from here on.
    if (out_[items[0]].text == "collections.OrderedDict") {
      if (!out_[items[1]].items.empty()) fail("expected an OrderedDict without arguments");
      push(Kind::dict);
    } else {
      push(Kind::call, std::move(items));
    }
  }
  void recall(uint32_t slot) {
    const auto it = memo_.find(slot);
    if (it == memo_.end()) fail(fmt::format("memo slot {} is empty", slot));
    stack_.push_back(it->second);
  }

  /// Values below the last MARK are out of reach until it is popped.
  [[nodiscard]] size_t floor() const { return marks_.empty() ? 0 : marks_.back(); }
  uint32_t top() const {
    if (stack_.size() <= floor()) fail("the stack is empty");
    return stack_.back();
  }
  uint32_t pop() {
    const uint32_t v = top();
    stack_.pop_back();
    return v;
  }
  std::vector<uint32_t> pop_many(size_t n) {
    if (stack_.size() - floor() < n) fail("the stack is empty");
    std::vector<uint32_t> items(stack_.end() - static_cast<std::ptrdiff_t>(n), stack_.end());
    stack_.resize(stack_.size() - n);
    return items;
  }
  std::vector<uint32_t> pop_to_mark() {
    if (marks_.empty()) fail("there is no mark on the stack");
    std::vector<uint32_t> items = pop_many(stack_.size() - marks_.back());
    marks_.pop_back();
    return items;
  }
  /// Adds items to the container on top of the stack, which stays there.
  void append(const std::vector<uint32_t>& items, Kind kind) {
    PickleValue& to = out_.values[top()];
    if (to.kind != kind) {
      fail(fmt::format("expected {} to add to, found {}", kind_name(kind), kind_name(to.kind)));
    }
    if (kind == Kind::dict && items.size() % 2 != 0) fail("a key without a value");
    to.items.insert(to.items.end(), items.begin(), items.end());
  }

  [[noreturn]] void fail(const std::string& what) const {
    throw Error(ErrorKind::format,
                fmt::format("{}: at byte {} of the pickle: {}", name_, opcode_at_, what),
                "The file is damaged, or it is not a checkpoint saved by torch.save.");
  }

  std::span<const std::byte> pickle_;
  const std::string& name_;
  std::span<const std::string_view> globals_;
  size_t at_ = 0;
  size_t opcode_at_ = 0;
  Pickle out_;
  std::vector<uint32_t> stack_;
  std::vector<size_t> marks_;
  std::unordered_map<uint32_t, uint32_t> memo_;
};

}  // namespace

Pickle parse_pickle(std::span<const std::byte> pickle, const std::string& name,
                    std::span<const std::string_view> globals) {
  return Machine(pickle, name, globals).run();
}

}  // namespace krait
