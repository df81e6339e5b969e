from gradbalance.statistics.masked import Moments, moments
StatisticalLoss = statistical_loss = None
