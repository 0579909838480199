// Images whose bytes stand scattered over files of their own, that have no name any more.
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "file_image.h"
#include "fingerprint.h"

namespace wanoffload::stress {

// A file with these bytes, in the page cache or not. Its name is gone when this returns: nothing is
// left behind.
inline SourceFilePtr scratch_file(const std::vector<std::byte>& content, bool direct, bool cached) {
  const char* const folder = std::getenv("TMPDIR");
  std::string path = std::string(folder != nullptr ? folder : "/tmp") + "/wanoffload-XXXXXX";
  const int number = ::mkstemp(path.data());
  check(number >= 0, "a file can be made as " + path);
  const ssize_t written = ::write(number, content.data(), content.size());
  check_equal(written, static_cast<ssize_t>(content.size()), "bytes written to " + path);
  if (!cached) {
    ::fsync(number);
    ::posix_fadvise(number, 0, 0, POSIX_FADV_DONTNEED);
  }
  ::close(number);
  auto file = std::make_shared<SourceFile>(path, direct);
  ::unlink(path.c_str());
  return file;
}

struct ScatteredImage {
  FileImagePtr image;
  SourceFilePtr file;  // one of those it is read from
  std::vector<std::byte> content;
};

// One or two files; extents in any order, aligned as in memory or not; gaps, which turn the bytes
// there to zeros, with this chance.
inline ScatteredImage scattered_image(Random& random, std::vector<std::byte> content, double gaps) {
  struct Target {
    std::vector<std::byte> content;
    std::vector<std::size_t> extents;  // their numbers
  };
  const std::size_t bytes = content.size();
  std::vector<FileExtent> extents;
  std::vector<Target> targets(random.between<std::size_t>(1, 2));
  const std::size_t most = random.chance(0.5) ? bytes : bytes / 4;
  for (std::size_t at = 0; at < bytes;) {
    const std::size_t count = std::min(bytes - at, random.between<std::size_t>(0, most) + 1);
    if (random.chance(gaps)) {
      std::fill_n(content.begin() + static_cast<std::ptrdiff_t>(at), count, std::byte{0});
    } else {
      Target& target = *random.one_of<Target*>({&targets.front(), &targets.back()});
      const bool alike = random.chance(0.5);
      while (alike && target.content.size() % kDirectAlignment != at % kDirectAlignment) {
        target.content.push_back(std::byte{0xBB});
      }
      target.extents.push_back(extents.size());
      extents.push_back({nullptr, target.content.size(), count, at});
      target.content.insert(target.content.end(), content.begin() + static_cast<std::ptrdiff_t>(at),
                            content.begin() + static_cast<std::ptrdiff_t>(at + count));
    }
    at += count;
  }
  SourceFilePtr file;
  for (const Target& target : targets) {
    file = scratch_file(target.content, random.chance(0.7), random.chance(0.5));
    for (const std::size_t number : target.extents) extents[number].file = file;
  }
  random.shuffle(extents);
  return {std::make_shared<FileImage>(std::move(extents), bytes), file, std::move(content)};
}

// Of one file, to be proved by its first fetch.
inline ScatteredImage unproven_image(Random& random, std::vector<std::byte> content) {
  const auto file = scratch_file(content, random.chance(0.7), random.chance(0.5));
  const std::uint64_t print = fingerprint(content.data(), content.size(), 1);
  const std::vector<FileExtent> extents{{file, 0, content.size(), 0}};
  return {std::make_shared<FileImage>(extents, content.size(), print), file, std::move(content)};
}

}  // namespace wanoffload::stress
