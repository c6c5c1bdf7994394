// What an operator reads of its node: attributes, and constants with their sizes and element types.
#pragma once
#include <cstring>
#include <initializer_list>
#include <string>
#include <vector>

#include "ort_api.h"

namespace {

using ort::Api;
using ort::Status;

struct Bad {  // what stands in the way, in words
  std::string text;
};

void must(const Api &api, Status *status, const char *what) {
  if (!status) return;
  api.release(status);
  throw Bad{what};
}

bool had(const Api &api, Status *status) {
  if (status) api.release(status);
  return !status;
}

struct Tensor {
  const void *data;
  std::vector<int64_t> sizes;
  int type;  // of its elements

  int64_t after_first() const {  // elements of an entry of the first dimension
    int64_t count = 1;
    for (size_t i = 1; i < sizes.size(); i++) count *= sizes[i];
    return count;
  }
};

constexpr int ANY = 0;

Tensor tensor(const Api &api, const ort::Value *value, int element, const char *name) {  // ANY: see its type
  ort::Shape *shape = nullptr;
  must(api, api.shape(value, &shape), "an input is no tensor");
  size_t rank = 0;
  int type = 0;
  Tensor found{};
  const bool read = had(api, api.element(shape, &type)) && had(api, api.rank(shape, &rank));
  if (read && rank <= 4) {
    found.sizes.resize(rank);
    if (!had(api, api.sizes(shape, found.sizes.data(), rank))) type = -1;
  }
  api.release(shape);
  if (!read || rank > 4 || (element != ANY && type != element)) throw Bad{std::string(name) + " has another rank or element type than it may"};
  void *data = nullptr;
  must(api, api.data(value, &data), "an input has no memory");
  found.data = data, found.type = type;
  return found;
}

struct Reader {  // of a node's attributes
  const Api &api;
  const ort::KernelInfo *info;

  int64_t whole(const char *name, int64_t otherwise) const {
    int64_t value = 0;
    return had(api, api.attribute(info, name, &value)) ? value : otherwise;
  }
  bool number(const char *name, double *to) const {
    float value = 0;
    const bool there = had(api, api.attribute(info, name, &value));
    if (there) *to = value;
    return there;
  }
  int64_t word(const char *name, std::initializer_list<const char *> words) const {
    char text[32] = {};
    size_t size = sizeof text;
    if (had(api, api.attribute(info, name, text, &size)) && size <= sizeof text) {
      int64_t i = 0;
      for (const char *one : words) {
        if (!strncmp(text, one, sizeof text)) return i;
        i++;
      }
    }
    throw Bad{std::string("the attribute ") + name + " is missing, or says what this kernel does not know"};
  }
};

}  // namespace
