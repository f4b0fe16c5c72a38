// imm_generate: images from a package that `imm export` wrote, or sequences of tokens from one of imm.package, without
// Python.
//
//     imm_generate --package=net.pt2 --seeds=0-63 [--labels=0,1,2] [--guidance=1.5] --out=images.npy
//
//     imm_generate --package=tokens.pt2 --tokens=16 --seeds=0-63 [--labels=0,1,2] [--guidance=1.5] --out=tokens.npy
//
// Writes [N, ...] float32 in the NumPy format. Labels repeat over the seeds; without them all images are of no class.
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <exception>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "../package.h"

namespace {

constexpr const char* kUsage =
    "usage: imm_generate --package=FILE --seeds=0-63 [--tokens=T] [--labels=0,1,2] [--guidance=W] --out=FILE.npy "
    "[--no-graph]\n";

struct Failure {
  std::string text;
};

int64_t integer(const std::string& text, const char* name) {
  size_t read = 0;
  long long value = -1;
  try {
    value = std::stoll(text, &read);
  } catch (const std::exception&) {
    read = 0;
  }
  if (read == 0 || read != text.size() || value < 0)
    throw Failure{std::string(name) + ": expected numbers and ranges such as 0-63,70, got '" + text + "'"};
  return value;
}

// "0-63,70" -> 0, ..., 63, 70.
std::vector<int64_t> integers(const std::string& text, const char* name) {
  std::vector<int64_t> values;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    const std::string item = text.substr(begin, end - begin);
    const size_t dash = item.find('-');
    const int64_t first = integer(item.substr(0, dash), name);
    const int64_t last = dash == std::string::npos ? first : integer(item.substr(dash + 1), name);
    if (last < first || last - first > 100'000'000)
      throw Failure{std::string(name) + ": expected numbers and ranges such as 0-63,70, got '" + text + "'"};
    for (int64_t i = 0; i <= last - first; ++i) values.push_back(first + i);
    begin = end + 1;
  }
  return values;
}

// NumPy's format, version 1.0: magic, length of the header, header padded to 64 bytes, data.
void write_npy(const std::string& path, const at::Tensor& images) {
  std::string header = "{'descr': '<f4', 'fortran_order': False, 'shape': (";
  for (const int64_t size : images.sizes()) header += std::to_string(size) + ", ";
  header += "), }";
  header.append(64 - (10 + header.size() + 1) % 64, ' ');
  header += '\n';
  const std::string part = path + ".part";
  {
    std::ofstream file(part, std::ios::binary);
    file.write("\x93NUMPY\x01\x00", 8);
    file.put(static_cast<char>(header.size() & 0xff)).put(static_cast<char>(header.size() >> 8));
    file << header;
    file.write(static_cast<const char*>(images.const_data_ptr()), static_cast<std::streamsize>(images.nbytes()));
    file.flush();
    if (!file) {
      std::remove(part.c_str());
      throw Failure{"out: cannot write " + part};
    }
  }
  if (std::rename(part.c_str(), path.c_str()) != 0) {
    std::remove(part.c_str());
    throw Failure{"out: cannot write " + path};
  }
}

std::map<std::string, std::string> parse(int count, char** words) {
  std::map<std::string, std::string> options;
  for (int i = 1; i < count; ++i) {
    const std::string_view word = words[i];
    const size_t equals = word.find('=');
    std::string name(word.substr(0, equals));
    if (name == "--cfg") name = "--guidance";
    const bool flag = name == "--no-graph";
    if (!flag && name != "--package" && name != "--seeds" && name != "--labels" && name != "--guidance" &&
        name != "--tokens" && name != "--out")
      throw Failure{"unknown option " + name};
    if (flag != (equals == std::string_view::npos))
      throw Failure{name + (flag ? ": takes no value" : ": expected a value")};
    options[name] = flag ? "" : std::string(word.substr(equals + 1));
  }
  for (const char* name : {"--package", "--seeds", "--out"}) {
    if (!options.count(name)) throw Failure{std::string(name) + " is missing"};
  }
  return options;
}

// The classes of --labels, at least one: "none" without the option.
std::vector<int64_t> classes_of(const std::map<std::string, std::string>& options, int64_t num_classes) {
  std::vector<int64_t> classes;
  if (options.count("--labels")) classes = integers(options.at("--labels"), "labels");
  if (!classes.empty() && num_classes == 0) throw Failure{"labels: expected none for an unconditional network"};
  for (const int64_t label : classes) {
    if (label > num_classes)
      throw Failure{"labels: expected classes up to " + std::to_string(num_classes) + ", which is none, got " +
                    std::to_string(label)};
  }
  if (classes.empty()) classes.push_back(num_classes);
  return classes;
}

std::optional<at::Tensor> guidance_of(const std::map<std::string, std::string>& options, bool guided) {
  if (options.count("--guidance") != guided)
    throw Failure{guided ? "guidance: expected a scale, since the package was exported with guidance"
                         : "guidance: expected none, since the package was exported without guidance"};
  if (!guided) return std::nullopt;
  size_t read = 0;
  const std::string& text = options.at("--guidance");
  double w = 0.0;
  try {
    w = std::stod(text, &read);
  } catch (const std::exception&) {
    read = 0;
  }
  if (read == 0 || read != text.size() || !std::isfinite(w))
    throw Failure{"guidance: expected a number, got '" + text + "'"};
  return at::full({1}, w, at::kDouble);
}

// run(seeds of at most `rows` images, their classes) for all of them, one after the other.
template <typename Run>
at::Tensor in_parts(const std::vector<int64_t>& seeds, const std::vector<int64_t>& classes, int64_t rows,
                    const Run& run) {
  std::vector<at::Tensor> parts;
  const auto total = static_cast<int64_t>(seeds.size());
  for (int64_t begin = 0; begin < total; begin += rows) {
    const int64_t count = std::min(rows, total - begin);
    const std::vector<int64_t> own(seeds.begin() + begin, seeds.begin() + begin + count);
    std::vector<int64_t> chosen;
    for (int64_t i = 0; i < count; ++i) chosen.push_back(classes[static_cast<size_t>(begin + i) % classes.size()]);
    parts.push_back(run(own, chosen).cpu());
  }
  return at::cat(parts).to(at::kFloat).contiguous();
}

// Whether a package is a token sampler's, which has three models of other names.
bool has_tokens(const std::string& path) {
  try {
    imm::load_token_package(path, /*graph=*/false);
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

std::unique_ptr<imm::SamplingLoop> load_images(const std::map<std::string, std::string>& options) {
  const std::string& path = options.at("--package");
  try {
    return imm::load_package(path, !options.count("--no-graph"));
  } catch (const std::exception&) {
    if (has_tokens(path)) throw Failure{"tokens: expected --tokens=T for a package of a token sampler"};
    throw;
  }
}

at::Tensor images(const std::map<std::string, std::string>& options, const std::vector<int64_t>& seeds) {
  const auto loop = load_images(options);
  if (loop->cond_dim() > 0)
    throw Failure{"package: expected a network of labels alone, got one that is conditioned on " +
                  std::to_string(loop->cond_dim()) + " numbers (imm.package.Package runs it)"};
  const auto classes = classes_of(options, loop->num_classes());
  const auto guidance = guidance_of(options, loop->guided());
  return in_parts(seeds, classes, loop->rows(), [&](const auto& own, const auto& chosen) {
    const std::optional<at::Tensor> none;
    const auto labels = loop->num_classes() > 0 ? std::optional(at::tensor(chosen, at::kLong)) : none;
    return loop->run(at::tensor(own, at::kLong), labels, guidance, none, none);
  });
}

at::Tensor sequences(const std::map<std::string, std::string>& options, const std::vector<int64_t>& seeds) {
  const auto tokens = integers(options.at("--tokens"), "tokens");
  if (tokens.size() != 1 || tokens[0] < 1)
    throw Failure{"tokens: expected a count >= 1, got '" + options.at("--tokens") + "'"};
  const auto package = imm::load_token_package(options.at("--package"), !options.count("--no-graph"));
  imm::TokenLoop& loop = *package.loop;
  const auto classes = classes_of(options, package.num_classes);
  const auto guidance = guidance_of(options, loop.guided());
  std::vector<double> scales(static_cast<size_t>(loop.noises()), 1.0);
  scales[0] = package.sigma_data;
  return in_parts(seeds, classes, loop.rows(), [&](std::vector<int64_t> own, std::vector<int64_t> chosen) {
    const auto count = static_cast<int64_t>(own.size());
    const auto rows = static_cast<size_t>(loop.rows());
    own.resize(rows, own[0]);
    chosen.resize(rows, chosen[0]);
    if (loop.guided()) chosen.insert(chosen.begin(), rows, package.num_classes);
    loop.begin(at::tensor(own, at::kLong), at::tensor(chosen, at::kLong), tokens[0], scales, guidance, std::nullopt);
    return std::get<0>(loop.next(tokens[0])).narrow(0, 0, count);
  });
}

void generate(const std::map<std::string, std::string>& options) {
  const auto seeds = integers(options.at("--seeds"), "seeds");
  const bool of_tokens = options.count("--tokens") > 0;
  const at::Tensor made = of_tokens ? sequences(options, seeds) : images(options, seeds);
  write_npy(options.at("--out"), made);
  std::cout << seeds.size() << (of_tokens ? " sequences of " : " images of ") << made.sizes().slice(1) << ": "
            << options.at("--out") << "\n";
}

}  // namespace

int main(int count, char** words) {
  try {
    generate(parse(count, words));
  } catch (const Failure& failure) {
    std::cerr << "imm_generate: " << failure.text << "\n" << kUsage;
    return 2;
  } catch (const c10::Error& error) {
    std::cerr << "imm_generate: " << error.what_without_backtrace() << "\n";
    return 1;
  } catch (const std::exception& error) {
    std::cerr << "imm_generate: " << error.what() << "\n";
    return 1;
  }
  return 0;
}
