// 2^x = 2^n 2^f with n = x rounded and f in [-1/2, 1/2], 2^f = 1 + f q(f): the numbers that takes.
#pragma once

namespace allnc {
namespace cpu {

template <class T>
struct Exp2;

template <>
struct Exp2<float> {
  static constexpr int kMantissa = 23;
  static constexpr float kRound = 0x1.8p23f;  // adding it rounds to an integer, held in the low bits
  static constexpr float kLowest = -126;      // below, 2^x is subnormal: taken as 0
  // q, minimax: relative error of 2^f 2.6e-9.
  static constexpr int kDegree = 6;
  static constexpr float kExp2[kDegree] = {0.6931472149680279f, 0.24022652782887738f,   0.055503105510137971f,
                                           0.0096176929729930f, 0.0013406643902351759f, 0.00015594678161326619f};
};

template <>
struct Exp2<double> {
  static constexpr int kMantissa = 52;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kLowest = -1022;
  // As above; relative error 1.8e-17.
  static constexpr int kDegree = 11;
  static constexpr double kExp2[kDegree] = {0.6931471805599456968,    0.2402265069591009801,   0.05550410866479039455,
                                            0.00961812910760700238,   0.001333355815343996475, 0.0001540353044157213033,
                                            0.0000152527273851938682, 1.321544267532982214e-6, 1.018064765923413889e-7,
                                            7.07257041281442351e-9,   4.078071929588336665e-10};
};

}  // namespace cpu
}  // namespace allnc
